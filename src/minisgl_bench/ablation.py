"""`minisgl bench ablation`: each setting against the default on the same workload.

The runs of a workload are A B A C A …: the default, a variant, the default again, the next variant, and so on. So each
variant is between two runs of the default, and neighbours share one. Its rate is divided by the mean of the two; their
spread is what the machine alone changes. A run repeats its workload until its seconds have passed.

The default's executor stays. A variant that needs one of its own gets it beside that one, with as many KV tokens.
"""

import argparse
import dataclasses
import gc
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any, Final

import msgspec
import numpy as np
import torch
from rich.table import Table

from minisgl.build import build_engine, max_seq_len, probe_machine
from minisgl.config import Config, resolve
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec
from minisgl.core.types import Request
from minisgl.errors import ConfigError
from minisgl.formats.hub import progress_bar
from minisgl.gpu.attention.select import available_backends, capability, choose
from minisgl.gpu.executor import attention_shape, build_local_executor, make_executor
from minisgl.gpu.memory import available_memory
from minisgl.plugins import load_policies
from minisgl.server.engine_process import SHORT_SLEEP
from minisgl_bench.profile import Recorder
from minisgl_bench.report import Report, draw_ablation, engine_path, gpu_name, on_gpu, slug, table
from minisgl_bench.workload import sampling_params

GPU_SECONDS: Final = 5.0  # of a run; on a CPU it is one workload
# Settings that need an executor of their own; with the others an engine can be built on one that is there.
EXECUTOR_FIELDS: Final = (
    "attn", "page_size", "cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens", "quantization", "kv_cache_dtype",
)  # fmt: skip
SLACK: Final = 2 * 256  # tokens: a request may leave most of a page of 256 empty, and admission keeps one more for it
KV_SHARE: Final = 0.4  # of the KV tokens that fit on a GPU, for each of two executors; the rest for weights in FP8
OVERHEAD: Final = 2.5  # s a run takes on average beside its seconds: executors are built and warmed up
THINK: Final = 0.1  # s until a client sends its next request, at most


@dataclass(frozen=True)
class Scenario:
    """Requests that share a beginning and go on in turns. Tokens of a turn are inclusive ranges, `shared` a number.

    They come at once, or from so many `clients`, each of which sends one up to THINK s after its last answer.
    """

    requests: int
    own: tuple[int, int]
    answer: tuple[int, int]
    turns: int = 1
    shared: int = 0
    clients: int = 0

    @property
    def length(self) -> int:
        """Tokens of a request and its answer, at most."""
        return self.shared + self.turns * (self.own[1] + self.answer[1])

    @property
    def tokens(self) -> int:
        """Tokens of KV that the requests take together, at most, without sharing, in pages of any size."""
        return self.requests * (self.length + SLACK)


# fmt: off
GPU_SCENARIOS: Final = {
    "batch": Scenario(256, own=(100, 1024), answer=(64, 256)), "few": Scenario(2, own=(100, 1024), answer=(64, 256)),
    "arrivals": Scenario(256, own=(100, 1024), answer=(64, 256), clients=64),
    "short": Scenario(256, own=(32, 256), answer=(32, 128)), "long": Scenario(32, own=(2048, 12288), answer=(64, 128)),
    "longest": Scenario(4, own=(32768, 36864), answer=(64, 128)),
    "chats": Scenario(64, own=(512, 512), answer=(64, 64), turns=4),
    "system-prompt": Scenario(128, own=(64, 64), answer=(64, 64), shared=2048),
}
CPU_SCENARIOS: Final = {
    "batch": Scenario(4, own=(16, 48), answer=(8, 16)),
    "arrivals": Scenario(4, own=(16, 48), answer=(8, 16), clients=2),
    "short": Scenario(4, own=(4, 8), answer=(4, 8)), "long": Scenario(3, own=(64, 160), answer=(8, 16)),
    "chats": Scenario(2, own=(32, 32), answer=(8, 8), turns=3),
    "system-prompt": Scenario(4, own=(8, 8), answer=(8, 8), shared=96),
}
# Group, scenario, and settings whose values are tried in every combination but for what is configured anyway.
Tried = tuple[str, str, Mapping[str, Sequence[Any]]]
TRIED: Final[tuple[Tried, ...]] = (
    ("overlap", "batch", {"overlap": (False, True)}),
    *(("launch-ahead", name, {"launch_ahead": ("one-step", "just-in-time")}) for name in ("batch", "arrivals")),
    *((name, name, {"cache": ("naive", "radix")}) for name in ("chats", "system-prompt")),
    ("page-size", "short", {"page_size": (32, 256)}), ("page-size", "batch", {"page_size": (64,)}),
    ("page-size", "long", {"page_size": (256,)}),
)
TRIED_ON_GPU: Final[tuple[Tried, ...]] = (
    ("quantization", "batch", {"quantization": (None, "fp8"), "kv_cache_dtype": ("auto", "fp8_e4m3")}),
    ("graphs", "batch", {"cuda_graph_max_bs": (0, 64)}), ("graphs", "few", {"cuda_graph_max_bs": (4,)}),
    ("graphs", "arrivals", {"piecewise_cuda_graph_max_tokens": (0,)}),
    ("chunk-size", "batch", {"max_prefill_length": (4096,)}),
    ("chunk-size", "long", {"max_prefill_length": (512, 2048, 16384)}),
    ("chunk-size", "longest", {"max_prefill_length": (32768,)}),
)
TRIED_ON_CPU: Final[tuple[Tried, ...]] = (
    ("quantization", "batch", {"quantization": (None, "int8"), "kv_cache_dtype": ("auto", "fp8_e4m3")}),
    ("chunk-size", "long", {"max_prefill_length": (16, 64, 256)}),
)
COLUMNS: Final = {  # of the table: the figure's name, and how it is written
    "tokens/s": ("tokens_per_second", "{:,.0f}"), "of default": ("of_default", "{:.3f}"),
    "spread": ("spread", "{:.1%}"), "TTFT ms": ("ttft_p50_ms", "{:.1f}"), "of default's": ("ttft_of_default", "{:.2f}"),
    "gap p99 ms": ("token_gap_p99_ms", "{:.1f}"), "cached": ("cached_tokens", "{:,}"),
    "build s": ("build_seconds", "{:.1f}"), "other GiB": ("other_gib", "{:.2f}"),
}
# fmt: on


@dataclass(frozen=True)
class Variant:
    """Settings to try on a scenario; none: the default, which the others of the scenario are compared with."""

    group: str
    scenario: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.changes.items()) or "default"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run. Without `error` all is there."""

    variant: Variant
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    output_tokens: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    ttft_p50_ms: float = 0.0
    token_gap_p99_ms: float = 0.0  # how long running requests waited for their next token
    build_seconds: float = 0.0
    other_gib: float = 0.0  # of the GPU beside the KV cache: graphs, workspaces, weights of its own
    error: str | None = None


@dataclass
class Prepared:
    """An executor, and the scenarios that have run on it, so that all is compiled that they need."""

    executor: LocalExecutor
    build_seconds: float
    other_gib: float
    warm: set[str] = field(default_factory=set)


class AblationRunner:
    """Runs variants one after the other, each for `seconds` after a first time on an executor.

    The default's executor is kept, and that of another variant for as long as the next ones can use either.
    """

    def __init__(self, config: Config, scenarios: Mapping[str, Scenario], seconds: float = 0.0) -> None:
        """Load the model as `config` says, and measure the pages that fit. Raises ConfigError or ModelError."""
        if config.tp > 1:
            raise ConfigError("an ablation runs on one device; with --tp, run bench offline once for each setting")
        gpu = on_gpu(config)
        plain = config.replace(cuda_graph_max_bs=0, piecewise_cuda_graph_max_tokens=0) if gpu else config
        built = build_engine(plain, progress=True)
        executor = built.engine.executor
        assert isinstance(executor, LocalExecutor)
        self.spec, self.weights = executor.runner.decoder.spec, executor.runner.decoder.weights
        self.model, self.folder, self.device = built.engine.model, built.folder, executor.device
        room = int(executor.num_pages * config.page_size * (KV_SHARE if gpu else 1))
        built.engine.close()
        longest = min(self.model.max_seq_len, room - SLACK)
        self.scenarios = {name: each for name, each in scenarios.items() if each.length <= longest}
        self.kv_tokens = min(room, max((each.tokens for each in self.scenarios.values()), default=0))
        self.config = resolve(config, probe_machine(), self.spec.checkpoint_dtype).config
        self.seconds = seconds
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def run(self, variant: Variant) -> Measurement:
        config = self.config.replace(**variant.changes)
        try:
            prepared = self._prepare(config)
            if variant.scenario not in prepared.warm:  # a first time, which compiles what comes up in it
                self._timed(prepared, config, variant, 0.0)
                prepared.warm.add(variant.scenario)
            return self._timed(prepared, config, variant, self.seconds)
        except Exception as error:  # whatever it is, it is this variant's result
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            self.close(keep=self._prepared.keys() - {executor_key(config)})
        except RuntimeError:
            failure += "; after it the device cannot be used"
        return Measurement(variant=variant, error=failure)

    def close(self, keep: Collection[tuple[Any, ...]] = ()) -> None:
        """Free the executors but those of some keys."""
        for key in self._prepared.keys() - keep:
            self._prepared.pop(key).executor.close()
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _timed(self, prepared: Prepared, config: Config, variant: Variant, least: float) -> Measurement:
        """A run in a new engine, of `least` seconds or one workload."""
        recorder, room = Recorder(prepared.executor), prepared.executor.num_pages * config.page_size
        model = msgspec.structs.replace(self.model, max_seq_len=min(self.model.max_seq_len, room))
        engine = Engine(recorder, model, config, policies=load_policies(config))
        scenario, vocab = self.scenarios[variant.scenario], model.vocab_size
        first_tokens: list[float] = []
        gc.collect()
        gc.freeze()  # until `close`: a collection of all that there is takes longer than what some settings change
        started, seconds, generated = time.perf_counter(), 0.0, 0
        while not generated or seconds < least:
            engine.cache.flush()
            generated += play(scenario, lambda requests: serve(engine, requests, scenario.clients, first_tokens), vocab)
            seconds = time.perf_counter() - started
        stats, gaps = engine.stats(), recorder.token_gaps() or [0.0]
        return Measurement(
            variant=variant, tokens_per_second=generated / seconds, seconds=seconds, output_tokens=generated,
            input_tokens=stats.prompt_tokens, cached_tokens=stats.cached_prompt_tokens,
            ttft_p50_ms=1e3 * median(first_tokens), token_gap_p99_ms=1e3 * float(np.percentile(gaps, 99)),
            build_seconds=prepared.build_seconds, other_gib=prepared.other_gib,
        )  # fmt: skip

    def _prepare(self, config: Config) -> Prepared:
        if (key := executor_key(config)) in self._prepared:
            return self._prepared[key]
        self.close(keep={executor_key(self.config)})
        before, started = available_memory(self.device), time.perf_counter()
        sized = config.replace(num_pages=max(2, self.kv_tokens // config.page_size))
        spec, length = self.spec, max_seq_len(config, self.spec)
        if config.quantization == self.config.quantization:
            executor = make_executor(spec, self.weights, sized, length)
        else:
            executor = build_local_executor(sized, self.folder, spec, length)
        build_seconds = time.perf_counter() - started
        taken = before - available_memory(self.device) - executor.runner.kv.k.nbytes - executor.runner.kv.v.nbytes
        return self._prepared.setdefault(key, Prepared(executor, build_seconds, max(0, taken) / 2**30))


def executor_key(config: Config) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in EXECUTOR_FIELDS)


def play(scenario: Scenario, answer: Callable[[list[Request]], list[list[int]]], vocab_size: int) -> int:
    """Put a scenario's requests to `answer`, turn by turn; tokens generated."""
    rng, total = np.random.default_rng(0), 0
    prompts = [rng.integers(vocab_size, size=scenario.shared, dtype=np.int32)] * scenario.requests
    for _ in range(scenario.turns):
        lengths = rng.integers(*scenario.own, size=len(prompts), endpoint=True)
        own = [rng.integers(vocab_size, size=length, dtype=np.int32) for length in lengths]
        prompts = [np.concatenate(parts) for parts in zip(prompts, own, strict=True)]
        params = sampling_params(rng.integers(*scenario.answer, size=len(prompts), endpoint=True).tolist())
        both = enumerate(zip(prompts, params, strict=True))
        answers = answer([Request(id=str(i), prompt_bytes=prompt.tobytes(), params=each) for i, (prompt, each) in both])
        prompts = [np.append(prompt, tokens).astype(np.int32) for prompt, tokens in zip(prompts, answers, strict=True)]
        total += sum(map(len, answers))
    return total


def serve(engine: Engine, requests: list[Request], clients: int, first_tokens: list[float]) -> list[list[int]]:
    """Drive the engine as a server does, which takes in what comes while it waits for the time to launch.

    The requests' answers; the seconds until each had its first token go to `first_tokens`.
    """
    rng, started, waiting = np.random.default_rng(0), time.perf_counter(), deque(requests)
    due = sorted(rng.uniform(0.0, THINK, clients).tolist()) or [0.0] * len(requests)  # when requests come
    sent: dict[str, float] = {}
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    while waiting or engine.has_work:
        now = time.perf_counter() - started
        while waiting and due and due[0] <= now:
            request = waiting.popleft()
            sent[request.id] = heapq.heappop(due)
            engine.add(request)
        if not engine.has_work:
            time.sleep(due[0] - now)
        elif (seconds := engine.seconds_to_launch()) > 0:
            time.sleep(min(seconds, SHORT_SLEEP))
        else:
            events = engine.step()
            now = time.perf_counter() - started
            for event in events:
                if event.tokens and not answers[event.id]:
                    first_tokens.append(now - sent[event.id])
                answers[event.id] += event.tokens
                if event.finish is not None and clients:
                    heapq.heappush(due, now + float(rng.uniform(0.0, THINK)))
    return list(answers.values())


def make_variants(config: Config, tried: Sequence[Tried], scenarios: Iterable[str]) -> list[Variant]:
    """What differs from the resolved `config`, scenario by scenario, each between two runs of the default."""
    runs = []
    for scenario in scenarios:
        default, variants = Variant("default", scenario), []
        for group, _, settings in (row for row in tried if row[1] == scenario):
            for values in itertools.product(*settings.values()):
                both = zip(settings, values, strict=True)
                if changes := {name: value for name, value in both if value != getattr(config, name)}:
                    variants += [Variant(group, scenario, changes), default]
        runs += [default, *variants] if variants else []
    return runs


def attention_pairs(config: Config, spec: ModelSpec, device: torch.device) -> tuple[Tried, ...]:
    """Pairs of `--attn` that differ from what `config` means in the prefill, or in the decode."""
    found, gpu = available_backends(device), capability(device)
    now = choose(config.attn, attention_shape(spec, config), found, gpu)
    others = [name for name, reason in found.items() if reason is None and (name != "torch" or not gpu)]
    prefills = [f"{name},{now.decode}" for name in others if name not in (now.prefill, "trtllm")]  # that one is fi's
    decodes = [f"{now.prefill},{name}" for name in others if name != now.decode]
    return ("attention", "long", {"attn": prefills}), ("attention", "batch", {"attn": decodes})


def against_default(measured: Sequence[Measurement], index: int) -> dict[str, float]:
    """A variant's run against the default's just before and after it; empty where one of the three is missing."""
    run, beside = measured[index], [*measured[index - 1 : index], *measured[index + 1 : index + 2]]
    if not run.variant.changes or len(beside) < 2 or any(item.error for item in (run, *beside)):
        return {}
    rate, ttft = mean(item.tokens_per_second for item in beside), mean(item.ttft_p50_ms for item in beside)
    found = {"of_default": run.tokens_per_second / rate, "ttft_of_default": run.ttft_p50_ms / ttft}
    return {**found, "spread": abs(beside[0].tokens_per_second - beside[1].tokens_per_second) / rate}


def ablation_table(title: str, measured: Sequence[Measurement], figures: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for item, found in zip(measured, figures, strict=True):
        if item.variant.changes or item.error is not None:
            cells = [text.format(found[name]) if name in found else "" for name, text in COLUMNS.values()]
            rows.append([item.variant.name, item.variant.scenario, *(cells if item.error is None else [item.error])])
    return table(title, ("setting", "workload", *COLUMNS), rows, left=2)


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    report = Report("ablation", arguments, engine_path(config, options.json, "ablation"), width=170)
    gpu = on_gpu(config)
    seconds = options.seconds if options.seconds is not None else GPU_SECONDS if gpu else 0.0
    runner = AblationRunner(config, GPU_SCENARIOS if gpu else CPU_SCENARIOS, seconds)
    tried = (*TRIED, *(TRIED_ON_GPU if gpu else TRIED_ON_CPU))
    tried += attention_pairs(runner.config, runner.spec, runner.device)
    variants = make_variants(runner.config, [row for row in tried if row[0] in options.only], runner.scenarios)
    if not variants:
        raise ConfigError(f"--only {','.join(options.only)}: there is nothing to try on this machine")
    minutes = len(variants) * (seconds + OVERHEAD) / 60
    report.print(f"{len(variants)} runs of {seconds:g} s or one workload; about {minutes:.0f} min on a GPU")
    report.figures |= {
        "config": dataclasses.asdict(runner.config.replace(api_key=None)),
        "kv_tokens": runner.kv_tokens,
        "scenarios": {name: dataclasses.asdict(scenario) for name, scenario in runner.scenarios.items()},
    }
    measured: list[Measurement] = []
    with closing(runner), progress_bar("trying", len(variants), enabled=True) as advance:
        for variant in variants:
            measured.append(runner.run(variant))
            advance(1)
            figures = [dataclasses.asdict(item) | against_default(measured, i) for i, item in enumerate(measured)]
            report.figures["measurements"] = figures
            report.write()
    title = f"{slug(runner.model.name)} on {gpu_name() if gpu else 'CPU'}"
    report.print(ablation_table(title, measured, figures))
    both = zip((item.variant for item in measured), figures, strict=True)
    bars = [(v.group, f"{v.name} ({v.scenario})", found["of_default"]) for v, found in both if "of_default" in found]
    report.finish(lambda figure: draw_ablation(figure, title, bars))
    return 1 if any(item.error is not None for item in measured) else 0
