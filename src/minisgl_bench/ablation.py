"""`minisgl bench ablation`: each setting against the default on the same workload, over weights loaded once."""

import argparse
import dataclasses
import functools
import gc
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import torch
from rich.table import Table

from minisgl.build import build_engine, max_seq_len, probe_machine
from minisgl.config import Config, resolve
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.types import Request
from minisgl.errors import ConfigError
from minisgl.formats.hub import progress_bar
from minisgl.gpu.attention.select import available_backends
from minisgl.gpu.executor import make_executor
from minisgl_bench.profile import Recorder
from minisgl_bench.report import Report, draw_ablation, engine_path, gpu_name, on_gpu, slug, table
from minisgl_bench.workload import Workload, sampling_params

PAGE_SIZES: Final = (1, 4, 16, 64, 256)
CHUNK_SIZES: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CPU_CHUNKS: Final = (16, 64, 256)
GRAPH_BATCHES: Final = (0, 4, 64)
PIECEWISE_TOKENS: Final = (0, 512, 2048)
PIECEWISE_CHUNK: Final = 512  # the chunk that they are tried at: the smaller a step, the more of it is its launch
# Settings that need an executor of their own; with the others an engine can be built on one that is there.
EXECUTOR_FIELDS: Final = ("attn", "page_size", "cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens")
# Tokens: a request may leave most of a page of 256 empty, and admission keeps one more for it.
SLACK: Final = 2 * 256


@dataclass(frozen=True)
class Scenario:
    """Requests that share a beginning and go on in turns. Tokens of a turn are inclusive ranges, `shared` a number."""

    requests: int
    own: tuple[int, int]
    answer: tuple[int, int]
    turns: int = 1
    shared: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of KV that the requests take together, at most, without sharing, in pages of any size."""
        return self.requests * (self.shared + self.turns * (self.own[1] + self.answer[1]) + SLACK)


GPU_SCENARIOS: Final = {
    "batch": Scenario(256, own=(100, 1024), answer=(64, 256)),
    "long": Scenario(32, own=(2048, 12288), answer=(64, 128)),
    "chats": Scenario(64, own=(512, 512), answer=(64, 64), turns=4),
    "system-prompt": Scenario(256, own=(64, 64), answer=(64, 64), shared=2048),
}
CPU_SCENARIOS: Final = {
    "batch": Scenario(4, own=(16, 48), answer=(8, 16)),
    "long": Scenario(3, own=(64, 160), answer=(8, 16)),
    "chats": Scenario(2, own=(32, 32), answer=(8, 8), turns=3),
    "system-prompt": Scenario(4, own=(8, 8), answer=(8, 8), shared=96),
}


@dataclass(frozen=True)
class Variant:
    """A setting to try on a scenario. `group` "default" is what the others of the scenario are compared with."""

    group: str
    label: str
    scenario: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.group}: {self.label}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a variant reached in the median of its runs. Without `error` all is there."""

    variant: Variant
    tokens_per_second: float = 0.0
    each_tokens_per_second: tuple[float, ...] = ()  # of every run, the slowest first: what the machine alone changes
    seconds: float = 0.0
    output_tokens: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    token_gap_p99_ms: float = 0.0  # how long running requests waited for their next token
    token_gap_max_ms: float = 0.0
    build_seconds: float = 0.0
    other_gib: float = 0.0  # of the GPU beside the KV cache: graphs and workspaces
    error: str | None = None


class AblationRunner:
    """Runs variants one after the other, each `repeats` times beside a first time, which compiles what it needs.

    An executor is kept for as long as the next variant can use it.
    """

    def __init__(self, config: Config, scenarios: Mapping[str, Scenario], repeats: int = 1) -> None:
        """Load the model as `config` says, and measure the pages that fit. Raises ConfigError or ModelError."""
        if config.tp > 1:
            raise ConfigError("an ablation runs on one device; with --tp, run bench offline once for each setting")
        machine = probe_machine()
        gpu = resolve(config, machine).config.device == "cuda"
        plain = config.replace(cuda_graph_max_bs=0, piecewise_cuda_graph_max_tokens=0) if gpu else config
        engine = build_engine(plain, progress=True).engine
        executor = engine.executor
        assert isinstance(executor, LocalExecutor)
        self.spec, self.weights = executor.runner.decoder.spec, executor.runner.decoder.weights
        self.model, self.device = engine.model, executor.device
        most = max(scenario.tokens for scenario in scenarios.values())
        self.kv_tokens = min(executor.num_pages * config.page_size, most)
        engine.close()
        self.config = resolve(config, machine, self.spec.checkpoint_dtype).config
        self.scenarios = scenarios
        self.repeats = repeats
        self._key: tuple[Any, ...] | None = None
        self._executor: LocalExecutor | None = None
        self._build_seconds = self._other_gib = 0.0
        self._warm: set[str] = set()
        self._ids = itertools.count()

    def run(self, variant: Variant) -> Measurement:
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
        executor, self._executor, self._key = self._executor, None, None
        if executor is not None:
            executor.close()
        del executor
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _measure(self, variant: Variant) -> Measurement:
        config = self.config.replace(**variant.changes)
        executor = self._executor_for(config)
        if variant.scenario not in self._warm:  # a first time, in which kernels are compiled for what comes up in it
            self._once(executor, config, variant)
            self._warm.add(variant.scenario)
        runs = [self._once(executor, config, variant) for _ in range(self.repeats)]
        runs.sort(key=lambda run: run.tokens_per_second)
        median = runs[(len(runs) - 1) // 2]  # of an even number the slower of the two in the middle
        return dataclasses.replace(median, each_tokens_per_second=tuple(run.tokens_per_second for run in runs))

    def _once(self, executor: LocalExecutor, config: Config, variant: Variant) -> Measurement:
        """One run in a new engine with an empty cache."""
        recorder, room = Recorder(executor), executor.num_pages * config.page_size
        model = msgspec.structs.replace(self.model, max_seq_len=min(self.model.max_seq_len, room))
        engine = Engine(recorder, model, config)
        started = time.perf_counter()
        answer = functools.partial(self._answer, engine)
        generated = play(self.scenarios[variant.scenario], answer, model.vocab_size)
        seconds, stats = time.perf_counter() - started, engine.stats()
        gaps = 1e3 * np.array(recorder.token_gaps() or [0.0])
        return Measurement(
            variant=variant, tokens_per_second=generated / seconds, seconds=seconds,
            output_tokens=generated, input_tokens=stats.prompt_tokens, cached_tokens=stats.cached_prompt_tokens,
            token_gap_p99_ms=float(np.percentile(gaps, 99)), token_gap_max_ms=float(gaps.max()),
            build_seconds=self._build_seconds, other_gib=self._other_gib,
        )  # fmt: skip

    def _executor_for(self, config: Config) -> LocalExecutor:
        key = tuple(getattr(config, name) for name in EXECUTOR_FIELDS)
        if self._executor is not None and key == self._key:
            return self._executor
        self.close()
        spec, pages = self.spec, max(2, self.kv_tokens // config.page_size)
        before, started = free_memory(self.device), time.perf_counter()
        executor = make_executor(spec, self.weights, config.replace(num_pages=pages), max_seq_len(config, spec))
        self._build_seconds = time.perf_counter() - started
        kv = executor.runner.kv.k.nbytes + executor.runner.kv.v.nbytes
        self._other_gib = max(0, before - free_memory(self.device) - kv) / 2**30
        self._executor, self._key, self._warm = executor, key, set()
        return executor

    def _answer(self, engine: Engine, workload: Workload) -> list[list[int]]:
        answers: dict[str, list[int]] = {}
        for prompt, params in zip(workload.prompts, workload.params, strict=True):
            engine.model.check(prompt, params)
            request = Request.make(str(next(self._ids)), prompt, params)
            answers[request.id] = []
            engine.add(request)
        while engine.has_work:
            for event in engine.step():
                answers[event.id] += event.tokens
        return list(answers.values())


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def play(scenario: Scenario, answer: Callable[[Workload], list[list[int]]], vocab_size: int) -> int:
    """Put a scenario's requests to `answer`, turn by turn; tokens generated."""
    rng, total = random.Random(0), 0
    prompts = [[rng.randrange(vocab_size) for _ in range(scenario.shared)]] * scenario.requests
    for _ in range(scenario.turns):
        own = [[rng.randrange(vocab_size) for _ in range(rng.randint(*scenario.own))] for _ in prompts]
        prompts = [prompt + tokens for prompt, tokens in zip(prompts, own, strict=True)]
        params = sampling_params([rng.randint(*scenario.answer) for _ in prompts])
        answers = answer(Workload(prompts=prompts, params=params))
        prompts = [prompt + tokens for prompt, tokens in zip(prompts, answers, strict=True)]
        total += sum(map(len, answers))
    return total


def make_variants(config: Config, groups: Sequence[str], backends: Sequence[str], gpu: bool) -> list[Variant]:
    """The defaults of the scenarios that these groups need, and everything that differs from the resolved `config`.

    Variants that can share an executor follow one another. The first default comes again at the end: that is the noise.
    """
    cache = "naive" if config.cache == "radix" else "radix"
    tried = [
        Variant("overlap", "off" if config.overlap else "on", "batch", {"overlap": not config.overlap}),
        Variant("chats", cache, "chats", {"cache": cache}),
        Variant("system-prompt", cache, "system-prompt", {"cache": cache}),
    ]
    for chunk in CHUNK_SIZES if gpu else CPU_CHUNKS:
        tried.append(Variant("chunk-size", str(chunk), "long", {"max_prefill_length": chunk}))
    for batch in GRAPH_BATCHES if gpu else ():
        tried.append(Variant("graphs", f"up to {batch}" if batch else "off", "batch", {"cuda_graph_max_bs": batch}))
    for tokens in PIECEWISE_TOKENS if gpu else ():
        changes = {"piecewise_cuda_graph_max_tokens": tokens, "max_prefill_length": PIECEWISE_CHUNK}
        tried.append(Variant("graphs", f"with prompts, {f'up to {tokens}' if tokens else 'off'}", "long", changes))
    for page_size in PAGE_SIZES:
        tried.append(Variant("page-size", str(page_size), "batch", {"page_size": page_size}))
    for pair in itertools.product(backends, repeat=2) if len(backends) > 1 else ():
        tried.append(Variant("attention", ",".join(pair), "batch", {"attn": ",".join(pair)}))
    tried = [v for v in tried if v.group in groups and any(getattr(config, k) != new for k, new in v.changes.items())]
    scenarios = dict.fromkeys(variant.scenario for variant in tried)
    defaults = [Variant("default", "as configured", name) for name in scenarios]
    return [*defaults, *tried, *defaults[:1]]


def ratio(item: Measurement, measured: Sequence[Measurement]) -> float | None:
    for base in measured:
        if base.variant.group == "default" and base.error is None and base.variant.scenario == item.variant.scenario:
            return None if item.error is not None else item.tokens_per_second / base.tokens_per_second
    return None


def ablation_table(title: str, measured: Sequence[Measurement]) -> Table:
    rows = []
    for item in measured:
        row = [item.variant.name, item.variant.scenario]
        if item.error is not None:
            rows.append([*row, f"failed: {item.error}"])
            continue
        share, each = ratio(item, measured), item.each_tokens_per_second
        row += [f"{item.tokens_per_second:,.0f}", f"{min(each):,.0f} – {max(each):,.0f}"]
        row += ["" if share is None else f"{share:.3f}", f"{item.cached_tokens / item.input_tokens:.0%}"]
        row += [f"{value:.1f}" for value in (item.token_gap_p99_ms, item.token_gap_max_ms, item.build_seconds)]
        rows.append([*row, f"{item.other_gib:.2f}"])
    columns = ("tokens/s", "from – to", "of default", "cached", "gap p99 ms", "gap max ms", "build s", "other GiB")
    return table(title, ("setting", "workload", *columns), rows, left=2)


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    report = Report("ablation", arguments, engine_path(config, options.json, "ablation"), width=150)
    gpu = on_gpu(config)
    scenarios = GPU_SCENARIOS if gpu else CPU_SCENARIOS
    runner = AblationRunner(config, scenarios, options.repeats)
    found = available_backends(runner.device)
    backends = [name for name, reason in found.items() if reason is None and (name != "torch" or not gpu)]
    variants = make_variants(runner.config, options.only, backends, gpu)
    if not variants:
        raise ConfigError(f"--only {','.join(options.only)}: there is nothing to try on this machine")
    report.figures |= {
        "config": dataclasses.asdict(runner.config),
        "kv_tokens": runner.kv_tokens,
        "scenarios": {name: dataclasses.asdict(scenario) for name, scenario in scenarios.items()},
    }
    measured: list[Measurement] = []
    with closing(runner), progress_bar("trying", len(variants), enabled=True) as advance:
        for variant in variants:
            measured.append(runner.run(variant))
            advance(1)
            rows = [{**dataclasses.asdict(item), "of_default": ratio(item, measured)} for item in measured]
            report.figures["measurements"] = rows
            report.write()
    title = f"{slug(runner.model.name)} on {gpu_name() if gpu else 'CPU'}"
    report.print(ablation_table(title, measured))
    shares = [(item.variant, ratio(item, measured)) for item in measured]
    bars = [(v.group, f"{v.name} ({v.scenario})", share) for v, share in shares if share is not None]
    report.finish(lambda figure: draw_ablation(figure, title, bars))
    return 1 if any(item.error is not None for item in measured) else 0
