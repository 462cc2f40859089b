"""The offline workload through another engine and through this one: vLLM in a process of its own, or transformers."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import median
from typing import Any, Final, NamedTuple

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from minisgl.build import probe_machine
from minisgl.config import Config, resolve
from minisgl.core.model_config import read_spec
from minisgl.errors import ConfigError, MinisglError
from minisgl.formats.hub import locate_model
from minisgl.llm import LLM
from minisgl_bench.profile import Recorder, Step
from minisgl_bench.report import Report, engine_path, on_gpu, table
from minisgl_bench.workload import Workload, WorkloadSpec, make_workload, redraw, workload_spec

FIGURES: Final = '{"version"'  # how the line with the figures begins, among whatever else vLLM prints
TAIL: Final = 30  # lines of vLLM's log in an error
WARM_TOKENS, ROUNDS, BATCH = 16, 3, 8


def warm_up(llm: LLM, workload: Workload, gpu: bool) -> None:
    """Run every kernel that the workload will need: on a GPU its very prompt lengths with short answers."""
    short = make_workload(WorkloadSpec(num_requests=2, input_len=(8, 8), output_len=(4, 4), seed=-1), 2)
    if gpu:
        short = redraw(workload, llm.model.vocab_size, -1, WARM_TOKENS)
    llm.generate(short.prompts, short.params, progress=False)


def measure(llm: LLM, workload: Workload) -> tuple[dict[str, int | float], list[Step]]:
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
        **recorder.figures(),
    }
    return figures, recorder.steps


def vllm_settings(config: Config, model: str) -> dict[str, Any]:
    """A resolved configuration as arguments of `vllm.LLM`; page size and attention are left to its own choice."""
    settings: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": config.tp,
        "dtype": config.dtype,
        "load_format": "dummy" if config.dummy_weight else "auto",
        "enable_prefix_caching": config.cache == "radix",
        "enforce_eager": config.cuda_graph_max_bs == 0,
        "max_num_seqs": config.max_running_requests,
        "max_num_batched_tokens": config.max_prefill_length,
        "gpu_memory_utilization": config.memory_ratio,
        "max_model_len": config.max_seq_len_override,
    }
    return {name: value for name, value in settings.items() if value is not None}


def run_vllm(settings: Mapping[str, Any], workload: Workload, seed: int) -> dict[str, Any]:
    """Output tokens and seconds of vLLM in its own process. Raises MinisglError, the end of its log printed."""
    order = {"settings": settings, "seed": seed, "prompts": workload.prompts, "max_tokens": workload.output_lens}
    order["temperature"] = workload.params[0].temperature
    command = [sys.executable, "-m", "minisgl_bench.vllm_process"]
    done = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    found = [line for line in lines if line.startswith(FIGURES)]
    if done.returncode != 0 or not found:
        print("\n".join(lines[-TAIL:]), file=sys.stderr)  # it logs to stdout
        raise MinisglError(f"vllm ended with status {done.returncode}: see above")
    figures: dict[str, Any] = json.loads(found[-1])
    return figures


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if find_spec(options.peer) is None:
        raise ConfigError(f"--with {options.peer}: it is not installed in {sys.prefix}; nothing to compare with")
    report = Report("compare", arguments, engine_path(config, options.json, "vllm"))
    spec, machine = workload_spec(options, on_gpu(config)), probe_machine()
    dtype = resolve(config, machine).config.dtype
    folder = locate_model(config.model, config.model_source, dtype=dtype, weights=not config.dummy_weight)
    model = read_spec(folder)
    resolved = resolve(config, machine, model.checkpoint_dtype).config
    workload = make_workload(spec, model.vocab_size)
    theirs = run_vllm(vllm_settings(resolved, str(folder)), workload, spec.seed)
    with LLM(config=config) as llm:
        warm_up(llm, workload, on_gpu(config))
        ours, _ = measure(llm, workload)
        notes = list(llm.notes)
    rate, their_rate = ours["output_tokens_per_second"], theirs["output_tokens"] / theirs["seconds"]
    ratio = rate / their_rate
    report.figures |= {"workload": dataclasses.asdict(spec), "config": notes, "ours": ours, "theirs": theirs}
    report.figures["ratio"] = ratio
    report.print(f"minisgl {rate:,.1f}, vllm {theirs['version']} {their_rate:,.1f} output tokens/s: ratio {ratio:.3f}")
    report.finish()
    return 0


class Round(NamedTuple):
    """An engine's first prompt alone (tokens/s while decoding), then all others (tokens/s overall), and all tokens."""

    decode: float
    throughput: float
    tokens: list[list[int]]


def make_round(times: Sequence[float], tokens: list[list[int]], started: float) -> Round:
    rate = sum(map(len, tokens)) / (time.perf_counter() - started)
    return Round((len(times) - 1) / (times[-1] - times[0]), rate, tokens)


class Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""


def their_round(model: Any, workload: Workload) -> Round:
    clock, tokens, started = Clock(), [], 0.0
    for index, (prompt, length) in enumerate(zip(workload.prompts, workload.output_lens, strict=True)):
        ids = torch.tensor([prompt], device=model.device)
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length}
        out = model.generate(ids, **settings, streamer=None if index else clock)
        tokens.append(out[0, len(prompt) :].tolist())
        assert len(tokens[-1]) == length
        started = started or time.perf_counter()  # behind the first request
    return make_round(clock.times[1:], tokens[1:], started)


def our_round(llm: LLM, workload: Workload) -> Round:
    times: list[float] = []
    for delta in llm.stream(workload.prompts[0], workload.params[0]):
        times += [time.perf_counter()] * len(delta.token_ids)
    started = time.perf_counter()
    answers = llm.generate(workload.prompts[1:], workload.params[1:], progress=False)
    return make_round(times, [answer.token_ids for answer in answers], started)


def comparable(config: Config, spec: WorkloadSpec) -> Config:
    """The configuration in transformers' precision; raises ConfigError for what it cannot be compared in."""
    if config.dummy_weight:
        raise ConfigError("--compare transformers needs the checkpoint's weights: leave --dummy-weight out")
    if config.dtype not in ("auto", "float32"):
        raise ConfigError("--compare transformers measures in float32: leave --dtype out")
    if spec.output_len[0] < 2:
        raise ConfigError("--compare transformers measures the time between tokens: give --output-len of at least 2")
    return config.replace(dtype="float32")


def compare_transformers(llm: LLM, config: Config, spec: WorkloadSpec, report: Report) -> dict[str, Any]:
    """Print and return the medians of ROUNDS rounds in output tokens/s: one request's decode rate, BATCH's throughput.

    Each round has new prompts, so that no prefix is in the cache. `same` counts the requests whose greedy tokens were
    equal; they may part ways where two logits differ by less than rounding.
    """
    folder = locate_model(config.model, config.model_source, dtype="float32")
    library: Any = transformers  # its annotations are partial
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    load = library.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    model = model.to("cuda" if on_gpu(config) else "cpu").eval()
    model.generation_config = library.GenerationConfig(do_sample=False, pad_token_id=0)  # greedy, no EOS
    rounds: list[tuple[Round, Round]] = []
    for index in range(ROUNDS):
        size = dataclasses.replace(spec, num_requests=BATCH + 1, temperature=0.0, seed=spec.seed + 1 + index)
        workload = make_workload(size, llm.model.vocab_size)
        first = their_round(model, workload) if index % 2 else None
        ours = our_round(llm, workload)
        rounds.append((ours, first or their_round(model, workload)))
    pairs = [pair for a, b in rounds for pair in zip(a.tokens, b.tokens, strict=True)]
    same = sum(mine == other for mine, other in pairs)
    figures: dict[str, Any] = {"with": "transformers", "same": same, "requests": len(pairs)}
    rows = []
    for kind, label in (("decode", "one request, decode"), ("throughput", f"{BATCH} together / one by one")):
        mine, other = (median(getattr(pair[side], kind) for pair in rounds) for side in (0, 1))
        figures |= {f"ours_{kind}": mine, f"theirs_{kind}": other, f"{kind}_ratio": mine / other}
        rows.append((label, f"{mine:.1f}", f"{other:.1f}", f"{mine / other:.2f}x"))
    report.print(table(f"medians of {ROUNDS} rounds", ("output tokens/s", "minisgl", "transformers", "ratio"), rows))
    report.print(f"the same greedy tokens in {same} of {len(pairs)} requests")
    return figures
