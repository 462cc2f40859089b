"""Runs an ablation's variants in one process, over weights that are loaded once."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import torch

from minisgl.bench.steps import Recorder
from minisgl.bench.variants import EXECUTOR_FIELDS, Scenario, SystemPrompt, Variant
from minisgl.bench.workload import Workload, WorkloadSpec, make_workload
from minisgl.build import build_engine, max_seq_len, probe_machine
from minisgl.config import Config, resolve
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec
from minisgl.core.types import ModelInfo, Request, SamplingParams
from minisgl.core.weights import Weights
from minisgl.errors import ConfigError

SLACK: Final = 2 * 256
"""Tokens: a request may leave most of a page of 256 empty, and admission keeps one more for it."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory: its weights, its configuration without open ends, and the tokens of KV that fit beside it."""

    spec: ModelSpec
    weights: Weights
    config: Config
    model: ModelInfo
    kv_tokens: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a variant reached in the median of its runs. Without `error` all is there.

    `each_tokens_per_second` has every run's rate, the slowest first: how far they lie apart is the machine's own doing.
    `token_gap_*` are over the steps that decoded: how long running requests waited for their next token.
    `other_gib` is what the executor took of the card beside the KV cache: graphs and workspaces.
    """

    variant: Variant
    tokens_per_second: float = 0.0
    each_tokens_per_second: tuple[float, ...] = ()
    seconds: float = 0.0
    output_tokens: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    token_gap_p99_ms: float = 0.0
    token_gap_max_ms: float = 0.0
    build_seconds: float = 0.0
    other_gib: float = 0.0
    error: str | None = None


def load(config: Config, most_tokens: int) -> Loaded:
    """Load the model as `config` says, measure the pages that fit, and keep the weights alone.

    `most_tokens` is the most KV that a trial uses. Raises ConfigError or ModelError.
    """
    if config.tp > 1:
        raise ConfigError("an ablation runs on one device; with --tp, run bench offline once for each setting")
    machine = probe_machine()
    gpu = resolve(config, machine).config.device == "cuda"
    built = build_engine(
        config.replace(cuda_graph_max_bs=0, piecewise_cuda_graph_max_tokens=0) if gpu else config, progress=True
    )
    executor = built.engine.executor
    assert isinstance(executor, LocalExecutor)
    decoder = executor.runner.decoder
    resolved = resolve(config, machine, decoder.spec.checkpoint_dtype).config
    fits = executor.num_pages * config.page_size
    built.engine.close()
    return Loaded(decoder.spec, decoder.weights, resolved, built.engine.model, min(fits, most_tokens))


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes free on a GPU; 0 elsewhere."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


class Trials:
    """Runs variants one after the other. An executor is kept for as long as the next variant can use it."""

    def __init__(self, loaded: Loaded, scenarios: Mapping[str, Scenario], repeats: int = 1) -> None:
        """Each variant runs `repeats` times, beside the first time, which compiles what it needs."""
        self.loaded = loaded
        self.scenarios = scenarios
        self.repeats = repeats
        self.device = torch.device(loaded.config.device)
        self._key: tuple[Any, ...] | None = None
        self._executor: LocalExecutor | None = None
        self._build_seconds = self._other_gib = 0.0
        self._warm: set[str] = set()
        self._ids = itertools.count()

    def run(self, variant: Variant) -> Measurement:
        """Measure a variant; one that fails says why, and does not stop the others."""
        try:
            return self._measure(variant)
        except Exception as error:  # whatever it is, it is this variant's result
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            self.close()
        except RuntimeError:
            failure += "; after it the device cannot be used"
        return Measurement(variant=variant, error=failure)

    def close(self) -> None:
        """Free the executor."""
        executor, self._executor, self._key = self._executor, None, None
        if executor is not None:
            executor.close()
        del executor
        release()

    def _measure(self, variant: Variant) -> Measurement:
        config = self.loaded.config.replace(**variant.changes)
        executor = self._executor_for(config)
        scenario = self.scenarios[variant.scenario]
        if variant.scenario not in self._warm:  # a first time, in which kernels are compiled for what comes up in it
            self._play(executor, config, scenario)
            self._warm.add(variant.scenario)
        runs = sorted(
            (self._once(executor, config, variant) for _ in range(self.repeats)), key=lambda run: run.tokens_per_second
        )
        # of an even number the slower of the two in the middle
        return dataclasses.replace(
            runs[(len(runs) - 1) // 2], each_tokens_per_second=tuple(run.tokens_per_second for run in runs)
        )

    def _once(self, executor: LocalExecutor, config: Config, variant: Variant) -> Measurement:
        recorder = Recorder(executor)
        started = time.perf_counter()
        generated, prompted, cached = self._play(recorder, config, self.scenarios[variant.scenario])
        seconds = time.perf_counter() - started
        gaps = 1e3 * np.array(recorder.token_gaps() or [0.0])
        return Measurement(
            variant=variant,
            tokens_per_second=generated / seconds,
            seconds=seconds,
            output_tokens=generated,
            input_tokens=prompted,
            cached_tokens=cached,
            token_gap_p99_ms=float(np.percentile(gaps, 99)),
            token_gap_max_ms=float(gaps.max()),
            build_seconds=self._build_seconds,
            other_gib=self._other_gib,
        )

    def _executor_for(self, config: Config) -> LocalExecutor:
        key = tuple(getattr(config, name) for name in EXECUTOR_FIELDS)
        if self._executor is not None and key == self._key:
            return self._executor
        self.close()
        pages = max(2, self.loaded.kv_tokens // config.page_size)
        free, started = free_memory(self.device), time.perf_counter()
        length = max_seq_len(config, self.loaded.spec)
        made = LocalExecutor(self.loaded.spec, self.loaded.weights, config.replace(num_pages=pages), length)
        self._build_seconds = time.perf_counter() - started
        kv = made.runner.kv.k.nbytes + made.runner.kv.v.nbytes
        self._other_gib = max(0, free - free_memory(self.device) - kv) / 2**30
        self._executor, self._key, self._warm = made, key, set()
        return made

    def _play(self, executor: LocalExecutor | Recorder, config: Config, scenario: Scenario) -> tuple[int, int, int]:
        """Run a scenario in a new engine, whose cache knows nothing.

        Returns tokens generated, prompt tokens, and how many of those were cached.
        """
        model, room = self.loaded.model, executor.num_pages * config.page_size
        model = msgspec.structs.replace(model, max_seq_len=min(model.max_seq_len, room))
        engine = Engine(executor, model, config)
        tokens = play(scenario, functools.partial(self._drive, engine), model.vocab_size)
        stats = engine.stats()
        return tokens, stats.prompt_tokens, stats.cached_prompt_tokens

    def _drive(self, engine: Engine, workload: Workload) -> list[list[int]]:
        """Answer all requests together; the tokens of each."""
        answers: dict[str, list[int]] = {}
        for prompt, params in zip(workload.prompts, workload.params, strict=True):
            request = Request(id=str(next(self._ids)), prompt=prompt, params=params)
            answers[request.id] = []
            engine.add(request)
        while engine.has_work:
            for event in engine.step():
                answers[event.id] += event.tokens
        return list(answers.values())


def play(scenario: Scenario, answer: Callable[[Workload], list[list[int]]], vocab_size: int) -> int:
    """Put a scenario's requests to `answer`, turn by turn where it has turns; tokens generated."""
    if isinstance(scenario, WorkloadSpec):
        return count(answer(make_workload(scenario, vocab_size)))
    if isinstance(scenario, SystemPrompt):
        shared, *own = random_tokens([scenario.shared, *[scenario.own] * scenario.requests], vocab_size)
        return count(answer(with_answers([shared + tokens for tokens in own], scenario.answer)))
    said: list[list[int]] = [[] for _ in range(scenario.conversations)]
    total = 0
    messages = iter(random_tokens([scenario.message] * scenario.conversations * scenario.turns, vocab_size))
    for _ in range(scenario.turns):
        prompts = [history + next(messages) for history in said]
        answers = answer(with_answers(prompts, scenario.answer))
        said = [prompt + tokens for prompt, tokens in zip(prompts, answers, strict=True)]
        total += count(answers)
    return total


def count(answers: Sequence[Sequence[int]]) -> int:
    """Tokens in all answers."""
    return sum(map(len, answers))


def random_tokens(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """A prompt of each length."""
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


def with_answers(prompts: list[list[int]], answer: int) -> Workload:
    """A workload whose every answer has `answer` tokens."""
    params = [
        SamplingParams(temperature=0.6, max_tokens=answer, ignore_eos=True, seed=index) for index in range(len(prompts))
    ]
    return Workload(prompts=prompts, params=params)


def scenario_tokens(scenario: Scenario) -> int:
    """Tokens of KV that a scenario's requests take together, at most, without sharing, in pages of any size."""
    if isinstance(scenario, WorkloadSpec):
        return scenario.num_requests * (scenario.input_len[1] + scenario.output_len[1] + SLACK)
    if isinstance(scenario, SystemPrompt):
        return scenario.requests * (scenario.shared + scenario.own + scenario.answer + SLACK)
    return scenario.conversations * (scenario.turns * (scenario.message + scenario.answer) + SLACK)
