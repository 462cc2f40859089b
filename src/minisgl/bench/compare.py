"""The same prompts through transformers' `generate` and through this engine, in one process, taking turns."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from minisgl.bench.workload import Workload, WorkloadSpec, make_workload
from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.llm import LLM

ROUNDS: Final = 3
BATCH: Final = 8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Medians over the rounds, in output tokens/s: one request's decode rate, and BATCH requests' throughput.

    `same` counts the requests, of `requests`, whose greedy tokens were equal; they may part ways where two
    logits differ by less than rounding.
    """

    ours_decode: float
    theirs_decode: float
    ours_throughput: float
    theirs_throughput: float
    same: int
    requests: int

    @property
    def decode_ratio(self) -> float:
        """Our decode rate for one request over theirs."""
        return self.ours_decode / self.theirs_decode

    @property
    def throughput_ratio(self) -> float:
        """Our throughput for BATCH requests together over theirs one after another."""
        return self.ours_throughput / self.theirs_throughput


@dataclass(frozen=True, kw_only=True)
class Round:
    """One engine's turn: the first prompt alone (tokens/s while decoding), then all prompts (tokens/s overall)."""

    decode: float
    throughput: float
    tokens: list[list[int]]


class Clock(BaseStreamer):
    """Remembers when the first and the last token came. transformers puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token is there."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing follows."""

    def rate(self) -> float:
        """Tokens/s after the first."""
        _, first, *_, last = self.times
        return (len(self.times) - 2) / (last - first)


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

    def generate(self, prompt: list[int], max_tokens: int, streamer: BaseStreamer | None = None) -> list[int]:
        """`max_tokens` new tokens."""
        ids = torch.tensor([prompt], device=self.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, streamer=streamer
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        assert len(tokens) == max_tokens
        return tokens

    def take_turn(self, workload: Workload) -> Round:
        """One request alone, then each after the other."""
        lengths = [params.max_tokens or 0 for params in workload.params]
        clock = Clock()
        self.generate(workload.prompts[0], lengths[0], clock)
        started = time.perf_counter()
        tokens = [self.generate(prompt, n) for prompt, n in zip(workload.prompts[1:], lengths[1:], strict=True)]
        throughput = sum(lengths[1:]) / (time.perf_counter() - started)
        return Round(decode=clock.rate(), throughput=throughput, tokens=tokens)


def our_turn(llm: LLM, workload: Workload) -> Round:
    """The first request alone, then the others together."""
    times: list[float] = []
    for delta in llm.stream(workload.prompts[0], workload.params[0]):
        times += [time.perf_counter()] * len(delta.token_ids)
    started = time.perf_counter()
    answers = llm.generate(workload.prompts[1:], workload.params[1:], progress=False)
    throughput = sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)
    return Round(
        decode=(len(times) - 1) / (times[-1] - times[0]),
        throughput=throughput,
        tokens=[answer.token_ids for answer in answers],
    )


def comparable(config: Config) -> Config:
    """The configuration in transformers' precision; raises ConfigError for what it cannot be compared in."""
    if config.dummy_weight:
        raise ConfigError("--compare transformers needs the checkpoint's weights: leave --dummy-weight out")
    if config.dtype not in ("auto", "float32"):
        raise ConfigError("--compare transformers measures in float32: leave --dtype out")
    return config.replace(dtype="float32")


def compare(llm: LLM, folder: Path, device: str, spec: WorkloadSpec) -> Comparison:
    """Take turns for ROUNDS rounds. Each round has new prompts, so that no prefix is in the cache."""
    theirs = Transformers(folder, device)
    size = dataclasses.replace(spec, num_requests=BATCH + 1, temperature=0.0)
    ours_rounds: list[Round] = []
    theirs_rounds: list[Round] = []
    for index in range(ROUNDS):
        workload = make_workload(dataclasses.replace(size, seed=spec.seed + 1 + index), llm.model.vocab_size)
        if index % 2:
            theirs_rounds.append(theirs.take_turn(workload))
        ours_rounds.append(our_turn(llm, workload))
        if not index % 2:
            theirs_rounds.append(theirs.take_turn(workload))
    pairs = [
        pair for a, b in zip(ours_rounds, theirs_rounds, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)
    ]
    return Comparison(
        ours_decode=median(r.decode for r in ours_rounds),
        theirs_decode=median(r.decode for r in theirs_rounds),
        ours_throughput=median(r.throughput for r in ours_rounds),
        theirs_throughput=median(r.throughput for r in theirs_rounds),
        same=sum(a == b for a, b in pairs),
        requests=len(pairs),
    )
