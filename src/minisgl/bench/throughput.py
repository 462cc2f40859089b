"""Output and total tokens/s of a workload through the offline API, against the floor, and where the time goes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from minisgl.bench.card import measure_ceilings
from minisgl.bench.ceilings import Ceilings
from minisgl.bench.floor import Floor, floor
from minisgl.bench.latency import decode_step_alone, start_to_first_token
from minisgl.bench.profile import Tracer, profile
from minisgl.bench.report import default_path, require_writable, write_report
from minisgl.bench.steps import Recorder, Step, step_figures
from minisgl.bench.workload import Workload, WorkloadSpec, make_workload, redraw, shorten
from minisgl.config import BUNDLED_MODEL, Config
from minisgl.core.executor import LocalExecutor
from minisgl.distributed.executor import GroupExecutor
from minisgl.formats.hub import locate_model
from minisgl.llm import LLM

CPU_SPEC: Final = WorkloadSpec(num_requests=16, input_len=(32, 128), output_len=(32, 128))
"""What is measured on a CPU when nothing else is asked for: half a minute instead of half an hour."""
SHORT_ANSWER: Final = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do beside measuring: compare with `against`, a floor from given ceilings, a traced run, a report."""

    against: str | None = None
    ceilings: Ceilings | None = None
    profile: bool = True
    json: Path | None = None


def device(config: Config) -> str:
    """Where the model will run."""
    return "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"


def default_spec(config: Config) -> WorkloadSpec:
    """The published workload on a GPU, the small one on a CPU."""
    return WorkloadSpec() if device(config) == "cuda" else CPU_SPEC


def report_path(config: Config, asked: Path | None, benchmark: str) -> Path | None:
    """Where the report goes: what was asked for, on a GPU else the default, and nowhere on a CPU."""
    if asked is not None or device(config) == "cpu":
        return asked
    return default_path(config.model or BUNDLED_MODEL, benchmark)


def warm_up(llm: LLM, workload: Workload, on_gpu: bool) -> None:
    """Run every kernel that the workload will need: on a GPU its very prompt lengths with short answers."""
    short = make_workload(WorkloadSpec(num_requests=2, input_len=(8, 8), output_len=(4, 4), seed=-1), 2)
    if on_gpu:
        short = shorten(redraw(workload, llm.model.vocab_size, seed=-1), SHORT_ANSWER)
    llm.generate(short.prompts, short.params, progress=False)


def measure(llm: LLM, workload: Workload) -> tuple[dict[str, int | float], list[Step]]:
    """Run the workload; tokens, seconds and tokens/s, and the steps it took."""
    executor = llm.engine.executor
    llm.engine.executor = recorder = Recorder(executor)
    try:
        started = time.perf_counter()
        answers = llm.generate(workload.prompts, workload.params)
        seconds = time.perf_counter() - started
    finally:
        llm.engine.executor = executor
    tokens_in, tokens_out = workload.input_tokens, sum(len(answer.token_ids) for answer in answers)
    figures = {
        "requests": len(answers),
        "input_tokens": tokens_in,
        "cached_input_tokens": sum(answer.cached_tokens for answer in answers),
        "output_tokens": tokens_out,
        "seconds": seconds,
        "output_tokens_per_second": tokens_out / seconds,
        "total_tokens_per_second": (tokens_in + tokens_out) / seconds,
        **step_figures(recorder),
    }
    return figures, recorder.steps


def run(config: Config, spec: WorkloadSpec, options: Options, arguments: Sequence[str]) -> int:
    """Measure, print, and write the report; the exit status."""
    path = report_path(config, options.json, "offline")
    require_writable(path)
    console = Console(soft_wrap=True)
    on_gpu = device(config) == "cuda"
    if options.against is not None:
        from minisgl.bench.compare import comparable

        config = comparable(config)
    with LLM(config=config) as llm:
        first_token = start_to_first_token(llm)
        for note in llm.notes:
            console.print(note, highlight=False, markup=False)
        report: dict[str, Any] = {"workload": dataclasses.asdict(spec), "config": list(llm.notes)}
        workload = make_workload(spec, llm.model.vocab_size)
        ceilings = options.ceilings or (measured_ceilings(llm) if on_gpu else None)
        warm_up(llm, workload, on_gpu)
        figures, steps = measure(llm, workload)
        figures["start_to_first_token_seconds"] = first_token
        if on_gpu:
            figures["decode_step_at_batch_1_ms"] = 1e3 * decode_step_alone(llm)
        if ceilings is not None:
            least = workload_floor(llm, config, workload, ceilings)
            figures["share_of_floor"] = least.seconds / figures["seconds"]
            report |= {"ceilings": dataclasses.asdict(ceilings), "floor": least.figures()}
            console.print(floor_line(least, ceilings), highlight=False)
        report["figures"] = figures
        console.print(figures_table(llm.model.name, spec, figures))
        if path is not None:
            write_report(path, "offline", arguments, report)
        if on_gpu and options.profile:
            report["split"] = run_profile(llm, workload, steps, figures["seconds"], console)
        if options.against is not None:
            report["comparison"] = run_comparison(llm, config, spec, console)
    if path is not None:
        write_report(path, "offline", arguments, report)
        console.print(f"written to {path}", highlight=False, markup=False)
    return 0


def local(llm: LLM) -> LocalExecutor:
    """What an LLM runs in this process: all of it, or rank 0's share."""
    executor = llm.engine.executor
    if isinstance(executor, GroupExecutor):
        return executor.local
    assert isinstance(executor, LocalExecutor)
    return executor


def measured_ceilings(llm: LLM) -> Ceilings:
    """Those of the card that the model runs on, in the model's dtype."""
    executor = local(llm)
    return measure_ceilings(executor.device, executor.runner.kv.k.dtype)


def workload_floor(llm: LLM, config: Config, workload: Workload, ceilings: Ceilings) -> Floor:
    """The floor of this model and workload; of several ranks, that of one's share, as if they added up in no time."""
    runner = local(llm).runner
    running = len(runner.tables.length) - 1
    share = dataclasses.replace(runner.decoder.spec, vocab_size=runner.decoder.spec.vocab_size // config.tp)
    return floor(share, workload, running, runner.kv.k.dtype.itemsize, ceilings)


def floor_line(least: Floor, ceilings: Ceilings) -> str:
    """The floor in words."""
    parts = (
        f"prefill {least.prefill_seconds:.2f} s, KV {least.kv_seconds:.2f} s, products {least.product_seconds:.2f} s"
    )
    reached = f"reading {ceilings.read / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.0f} TFLOP/s"
    return f"floor: {least.tokens_per_second:,.0f} output tokens/s ({parts}) at {reached}"


def run_profile(
    llm: LLM, workload: Workload, steps: Sequence[Step], seconds: float, console: Console
) -> dict[str, Any]:
    """Run the same lengths again, some steps traced; print the split, return it.

    A failure is printed and put in the report instead: what was measured before it stands.
    """
    executor = llm.engine.executor
    other = redraw(workload, llm.model.vocab_size, seed=-2)

    def again(tracer: Tracer) -> None:
        llm.engine.executor = tracer
        llm.generate(other.prompts, other.params)

    try:
        result = profile(executor, steps, again)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        console.print(f"no split of the time: {type(error).__name__}: {error}", highlight=False, markup=False)
        return {"error": str(error)}
    finally:
        llm.engine.executor = executor
    rest = seconds - sum(result.seconds.values())
    table = Table(
        "part", "seconds", "share", title=f"where {seconds:.2f} s went, from {result.traced_steps} steps traced"
    )
    for name, spent in [*result.seconds.items(), ("the rest, or tracing's own cost", rest)]:
        table.add_row(name, f"{spent:.3f}", f"{spent / seconds:.1%}")
    console.print(table)
    if result.between_ms is not None:
        console.print(f"device idle before a decode step of the largest batch: {result.between_ms:.3f} ms")
    return {**dataclasses.asdict(result), "measured_seconds": seconds}


def run_comparison(llm: LLM, config: Config, spec: WorkloadSpec, console: Console) -> dict[str, Any]:
    """Compare with transformers, print the table, return the figures."""
    from minisgl.bench.compare import BATCH, ROUNDS, compare

    folder = locate_model(config.model, config.model_source, dtype="float32")
    result = compare(llm, folder, device(config), spec)
    table = Table("output tokens/s", "minisgl", "transformers", "ratio", title=f"medians of {ROUNDS} rounds in turns")
    rows = (
        ("one request, decode", result.ours_decode, result.theirs_decode, result.decode_ratio),
        (f"{BATCH} together / one by one", result.ours_throughput, result.theirs_throughput, result.throughput_ratio),
    )
    for name, ours, theirs, ratio in rows:
        table.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.2f}x")
    console.print(table)
    console.print(f"the same greedy tokens in {result.same} of {result.requests} requests")
    ratios = {"decode_ratio": result.decode_ratio, "throughput_ratio": result.throughput_ratio}
    return {"with": "transformers", **dataclasses.asdict(result), **ratios}


def figures_table(model: str, spec: WorkloadSpec, figures: dict[str, int | float]) -> Table:
    """The figures, a row each."""
    span = "{0[0]}–{0[1]}".format
    table = Table(title=f"{model}: prompts {span(spec.input_len)}, outputs {span(spec.output_len)}, seed {spec.seed}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:,.3f}")
    return table
