"""The same prompts through transformers' `generate` and through this engine, in one process, one after the other."""

import dataclasses
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.formats.hub import locate_model
from minisgl.llm import LLM
from minisgl_bench.report import Report, on_gpu, table
from minisgl_bench.workload import Workload, WorkloadSpec, make_workload

ROUNDS: Final = 3
BATCH: Final = 8


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


def comparable(config: Config) -> Config:
    """The configuration in transformers' precision; raises ConfigError for what it cannot be compared in."""
    if config.dummy_weight:
        raise ConfigError("--compare transformers needs the checkpoint's weights: leave --dummy-weight out")
    if config.dtype not in ("auto", "float32"):
        raise ConfigError("--compare transformers measures in float32: leave --dtype out")
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
