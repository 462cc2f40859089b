"""The same prompts through transformers' `generate` and through this engine, in one process, taking turns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import transformers
from rich.console import Console
from transformers.generation.streamers import BaseStreamer

from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.llm import LLM
from minisgl.models.locate import locate_model
from minisgl_bench.report import on_gpu, table
from minisgl_bench.workload import Workload, WorkloadSpec, make_workload

ROUNDS: Final = 3
BATCH: Final = 8


@dataclass(frozen=True)
class Round:
    """An engine's first prompt alone (tokens/s while decoding), then all others (tokens/s overall), and all tokens."""

    decode: float
    throughput: float
    tokens: list[list[int]]


class Clock(BaseStreamer):
    """A streamer of transformers that remembers when tokens came. The prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""


class Transformers:
    """The checkpoint in transformers, in float32, greedy, with EOS switched off."""

    def __init__(self, folder: Path, device: str) -> None:
        library: Any = transformers  # its annotations are partial
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
        self.device = device
        self.model = library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        ).to(device)
        self.model.eval()
        self.model.generation_config = library.GenerationConfig(do_sample=False, pad_token_id=0)

    def generate(self, prompt: list[int], max_tokens: int, streamer: Clock | None = None) -> list[int]:
        ids = torch.tensor([prompt], device=self.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, streamer=streamer
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        assert len(tokens) == max_tokens
        return tokens

    def run(self, workload: Workload) -> Round:
        """One request alone, then each after the other."""
        (first, *others), lengths, clock = workload.prompts, workload.output_lens, Clock()
        self.generate(first, lengths[0], clock)
        started = time.perf_counter()
        tokens = [self.generate(prompt, length) for prompt, length in zip(others, lengths[1:], strict=True)]
        seconds = time.perf_counter() - started
        return Round(decode_rate(clock.times[1:]), sum(lengths[1:]) / seconds, tokens)


def decode_rate(times: Sequence[float]) -> float:
    """Tokens/s after the first."""
    return (len(times) - 1) / (times[-1] - times[0])


def our_round(llm: LLM, workload: Workload) -> Round:
    """The first request alone, then the others together."""
    times: list[float] = []
    for delta in llm.stream(workload.prompts[0], workload.params[0]):
        times += [time.perf_counter()] * len(delta.token_ids)
    started = time.perf_counter()
    answers = llm.generate(workload.prompts[1:], workload.params[1:], progress=False)
    tokens = [answer.token_ids for answer in answers]
    return Round(decode_rate(times), sum(map(len, tokens)) / (time.perf_counter() - started), tokens)


def comparable(config: Config) -> Config:
    """The configuration in transformers' precision; raises ConfigError for what it cannot be compared in."""
    if config.dummy_weight:
        raise ConfigError("--compare transformers needs the checkpoint's weights: leave --dummy-weight out")
    if config.dtype not in ("auto", "float32"):
        raise ConfigError("--compare transformers measures in float32: leave --dtype out")
    return config.replace(dtype="float32")


def compare_transformers(llm: LLM, config: Config, spec: WorkloadSpec, out: Console) -> dict[str, Any]:
    """Print and return the medians of ROUNDS rounds in output tokens/s: one request's decode rate, BATCH's throughput.

    Each round has new prompts, so that no prefix is in the cache. `same` counts the requests whose greedy tokens were
    equal; they may part ways where two logits differ by less than rounding.
    """
    folder = locate_model(config.model, config.model_source, dtype="float32")
    theirs = Transformers(folder, "cuda" if on_gpu(config) else "cpu")
    rounds: list[tuple[Round, Round]] = []
    for index in range(ROUNDS):
        size = dataclasses.replace(spec, num_requests=BATCH + 1, temperature=0.0, seed=spec.seed + 1 + index)
        workload = make_workload(size, llm.model.vocab_size)
        if index % 2:
            second = theirs.run(workload)
            rounds.append((our_round(llm, workload), second))
        else:
            rounds.append((our_round(llm, workload), theirs.run(workload)))
    pairs = [pair for ours, other in rounds for pair in zip(ours.tokens, other.tokens, strict=True)]
    figures: dict[str, Any] = {
        "ours_decode": median(ours.decode for ours, _ in rounds),
        "theirs_decode": median(other.decode for _, other in rounds),
        "ours_throughput": median(ours.throughput for ours, _ in rounds),
        "theirs_throughput": median(other.throughput for _, other in rounds),
        "same": sum(ours == other for ours, other in pairs),
        "requests": len(pairs),
    }
    rows = []
    for label, kind in (("one request, decode", "decode"), (f"{BATCH} together / one by one", "throughput")):
        ours_rate, their_rate = figures[f"ours_{kind}"], figures[f"theirs_{kind}"]
        figures[f"{kind}_ratio"] = ours_rate / their_rate
        rows.append((label, f"{ours_rate:.1f}", f"{their_rate:.1f}", f"{ours_rate / their_rate:.2f}x"))
    columns = ("output tokens/s", "minisgl", "transformers", "ratio")
    out.print(table(f"medians of {ROUNDS} rounds in turns", columns, rows))
    out.print(f"the same greedy tokens in {figures['same']} of {figures['requests']} requests")
    return {"with": "transformers", **figures}
