"""Output tokens/s of a workload through the offline API, against the roofline, where the time goes, and latencies."""

import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from minisgl.config import Config
from minisgl.core.executor import LocalExecutor
from minisgl.core.quantization import Fp8Weight
from minisgl.core.types import SamplingParams
from minisgl.distributed.executor import GroupExecutor
from minisgl.llm import LLM
from minisgl_bench.compare import comparable, compare_transformers, measure, warm_up
from minisgl_bench.profile import Step, Tracer, profile
from minisgl_bench.report import Report, engine_path, on_gpu, table
from minisgl_bench.roofline import measure_peak_rates, roofline
from minisgl_bench.workload import Workload, make_workload, random_tokens, redraw, workload_spec

CONTEXT, TOKENS = 1024, 64  # where the decode step at batch 1 is measured, and over how many


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    report, gpu = Report("offline", arguments, engine_path(config, options.json, "offline")), on_gpu(config)
    spec = workload_spec(options, gpu)
    if options.compare is not None:
        config = comparable(config, spec)
    with LLM(config=config) as llm:
        token_times(llm, min(8, llm.model.max_seq_len - 1), 1)
        first_token = process_seconds()
        report.print(*llm.notes)
        report.figures |= {"workload": dataclasses.asdict(spec), "config": list(llm.notes)}
        workload = make_workload(spec, llm.model.vocab_size)
        executor = llm.engine.executor
        if isinstance(executor, GroupExecutor):
            executor = executor.local  # rank 0's share
        assert isinstance(executor, LocalExecutor)
        peak = options.peak_rates
        if peak is None and gpu:
            peak = measure_peak_rates(executor.device, executor.runner.decoder.weights.embedding.dtype)
        warm_up(llm, workload, gpu)
        figures, steps = measure(llm, workload)
        figures["start_to_first_token_seconds"] = first_token
        if gpu:
            figures["decode_step_at_batch_1_ms"] = 1e3 * decode_step_alone(llm)
        if peak is not None:
            # of several ranks the least time is that of one's share, as if they added up in no time
            model, slots = executor.runner.decoder.spec, len(executor.runner.tables.length) - 1
            share = dataclasses.replace(model, vocab_size=model.vocab_size // config.tp)
            weights, kept = executor.runner.decoder.weights, executor.runner.kv.k.dtype.itemsize
            fp8 = isinstance(weights.layers[0].o, Fp8Weight)
            least = roofline(share, workload, slots, weights.embedding.dtype.itemsize, peak, fp8, kept)
            figures["share_of_roofline"] = least.seconds / figures["seconds"]
            totals = {"output_tokens_per_second": least.tokens_per_second, "seconds": least.seconds}
            report.figures["peak_rates"] = dataclasses.asdict(peak)
            report.figures["roofline"] = {**totals, **dataclasses.asdict(least)}
            report.print(
                f"roofline: {least.tokens_per_second:,.0f} output tokens/s (prefill {least.prefill_seconds:.2f} s, KV "
                f"{least.kv_seconds:.2f} s, GEMMs {least.gemm_seconds:.2f} s) at reading {peak.read / 1e12:.2f} TB/s, "
                f"{peak.flops / 1e12:.0f} TFLOP/s"
            )
        report.figures["figures"] = figures
        spans = f"prompts {spec.input_len[0]}–{spec.input_len[1]}, outputs {spec.output_len[0]}–{spec.output_len[1]}"
        texts = (f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" for value in figures.values())
        rows = zip((name.replace("_", " ") for name in figures), texts, strict=True)
        report.print(table(f"{llm.model.name}: {spans}, seed {spec.seed}", ("figure", "value"), rows))
        report.write()
        if gpu and options.profile:
            report.figures["split"] = split_time(llm, workload, steps, figures["seconds"], report)
        if options.compare is not None:
            report.figures["comparison"] = compare_transformers(llm, config, spec, report)
    report.finish()
    return 0


def process_seconds() -> float:
    """Seconds since this process started, by Linux's account (proc(5), field 22 of /proc/self/stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / float(os.sysconf("SC_CLK_TCK"))


def decode_step_alone(llm: LLM) -> float:
    tokens = min(TOKENS, llm.model.max_seq_len // 2)
    times = token_times(llm, max(1, min(CONTEXT, llm.model.max_seq_len - tokens) - tokens // 2), tokens)
    return median(later - earlier for earlier, later in itertools.pairwise(times))


def token_times(llm: LLM, length: int, tokens: int) -> list[float]:
    (prompt,) = random_tokens([length], llm.model.vocab_size, -1)
    times: list[float] = []
    for delta in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)):
        times += [time.perf_counter()] * len(delta.token_ids)
    return times


def split_time(llm: LLM, workload: Workload, steps: Sequence[Step], seconds: float, report: Report) -> dict[str, Any]:
    """Run the same lengths again, some steps traced; print and return the split, or what failed."""
    executor = llm.engine.executor
    other = redraw(workload, llm.model.vocab_size, -2)

    def again(tracer: Tracer) -> None:
        llm.engine.executor = tracer
        llm.generate(other.prompts, other.params)

    try:
        result = profile(executor, steps, again)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        report.print(f"no split of the time: {type(error).__name__}: {error}")
        return {"error": str(error)}
    finally:
        llm.engine.executor = executor
    parts = {**result["seconds"], "the rest, or tracing's own cost": seconds - sum(result["seconds"].values())}
    rows = [(name, f"{spent:.3f}", f"{spent / seconds:.1%}") for name, spent in parts.items()]
    title = f"where {seconds:.2f} s went, from {result['traced_steps']} steps traced"
    report.print(table(title, ("part", "seconds", "share"), rows))
    if result["between_ms"] is not None:
        report.print(f"device idle before a decode step of the largest batch: {result['between_ms']:.3f} ms")
    return {**result, "measured_seconds": seconds}
