"""`minisgl simulate`: a load test in virtual time, of engines and of clients that send them sessions of requests."""

import argparse
import copy
import gc
import heapq
import itertools
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from minisgl.config import Config, Machine, resolve
from minisgl.core.engine import Engine
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.types import ModelInfo, Request, SamplingParams, TokenEvent
from minisgl.distributed.shard import check_shards
from minisgl.errors import ConfigError
from minisgl.formats.hub import locate_model, progress_bar
from minisgl.plugins import load_policies
from minisgl.prefix_routing import PrefixRouter
from minisgl.trace import TraceWriter
from minisgl_bench import metrics, traffic
from minisgl_bench.command import load_kind
from minisgl_bench.cost_model import CostModel, GpuConstants, pages_that_fit, read_gpu
from minisgl_bench.metrics import RequestRecord
from minisgl_bench.report import GPU_HOURS, Report, draw_fleet, draw_latencies, slug
from minisgl_bench.simulated_executor import SimulatedExecutor, TimedExecutor
from minisgl_bench.traffic import Repeated, Session, Turn

WHOLE_RECORDS: Final = 20_000  # about so many requests, evenly spread, keep the times of all their tokens
SHOWN: Final = ("tp", "dtype", "max_running_requests", "max_prefill_length", "schedule_policy", "page_size", "cache")


class Replica:
    """One engine on simulated GPUs. `step` takes in what is due by its clock and moves on to the end of a step."""

    def __init__(self, spec: ModelSpec, config: Config, gpu: GpuConstants, exact: bool = False) -> None:
        check_shards(spec, config.tp)
        config = config.replace(quantization="fp8") if spec.fp8 else config
        if (config.quantization == "fp8" or config.kv_cache_dtype != "auto") and not gpu.fp8_flops:
            rule = "leave out --quantization and --kv-cache-dtype, and take a model that is not in FP8"
            raise ConfigError(f"{gpu.name}: its constants were measured in half precision, without fp8_flops; {rule}")
        self.gpu = gpu
        self.exact = exact
        machine = Machine(True, gpu.name, gpu.memory, config.tp)
        self.config = config = resolve(config, machine, spec.checkpoint_dtype).config
        wanted = config.max_seq_len_override or spec.max_position
        self.num_pages = config.num_pages or pages_that_fit(spec, config, gpu, wanted)
        length = min(wanted, self.num_pages * config.page_size)
        self.model = ModelInfo(name=spec.architecture, vocab_size=spec.vocab_size, max_seq_len=length, eos_token_ids=())
        self.cost = CostModel(spec, config, gpu)
        self._start()

    def another(self) -> "Replica":
        """An idle one of the same kind, which shares the model of costs and what it has computed already."""
        other = copy.copy(self)
        other._start()
        return other

    def _start(self) -> None:
        pages, page, vocab = self.num_pages, self.config.page_size, self.model.vocab_size
        rows = self.config.max_running_requests
        assert rows is not None
        device = SimulatedExecutor(pages, page, rows, self.model.max_seq_len, vocab) if self.exact else None
        self.executor = TimedExecutor(pages, vocab, self.cost, device)
        policies = load_policies(self.config)
        self.engine = Engine(self.executor, self.model, self.config, clock=lambda: self.executor.now, policies=policies)
        self._received: deque[tuple[float, float, Request]] = deque()  # when, and when the engine gets it
        self._server_free_at = 0.0

    @property
    def has_work(self) -> bool:
        return self.engine.has_work or bool(self._received)

    @property
    def next_step_at(self) -> float:
        """Of a replica that has work: when it takes in what came until then, and begins a step."""
        if self.engine.has_work:
            return self.executor.now + self.engine.seconds_to_launch()
        return max(self.executor.now, self._received[0][0])

    @property
    def seen_at(self) -> float:
        """When clients see the events of the last step: the server first handles what came before them."""
        return max(self.executor.now, self._server_free_at) + self.gpu.event_seconds

    def send(self, request: Request, time: float) -> None:
        """Let a request reach the server at this time, not before those that were sent already."""
        self._server_free_at = max(self._server_free_at, time) + self.gpu.request_seconds
        self._received.append((time, self._server_free_at, request))

    def step(self) -> list[TokenEvent]:
        """The engine's events at the time that it is afterwards. An idle engine waits for a request."""
        if not self.engine.has_work:
            self.executor.now = max(self.executor.now, self._received[0][1])
        self.executor.now += self.engine.seconds_to_launch()
        while self._received and self._received[0][1] <= self.executor.now:
            self.engine.add(self._received.popleft()[2])
        return self.engine.step()


# Chooses the replica for a prompt, by the requests at each that have no whole answer yet.
Router = Callable[[bytes, Mapping[int, float]], int]


def random_router(seed: int) -> Router:
    rng = random.Random(seed)
    return lambda prompt, loads: rng.choice(list(loads))


def round_robin_router(seed: int) -> Router:
    turns = itertools.count()
    return lambda prompt, loads: list(loads)[next(turns) % len(loads)]


# The values of `--router`, made with a seed.
ROUTERS: Final[Mapping[str, Callable[[int], Router]]] = {
    "random": random_router,
    "round-robin": round_robin_router,
    "least-loaded": lambda seed: PrefixRouter(block=1 << 30).choose,  # no prompt has a whole block
    "prefix": lambda seed: PrefixRouter(max_blocks=1 << 22).choose,  # 268 million tokens: those of 100 replicas or more
}


Turns = deque[tuple[Turn, RequestRecord]]  # that a client still has to send in a session


@dataclass(eq=False, slots=True)
class _Sent:
    """A request without its whole answer, where it is, and what its client sends `think` s behind the answer."""

    request: Request
    record: RequestRecord
    turns: Turns
    think: float
    replica: int = 0


class Clients:
    """Sends sessions to replicas under one clock and keeps what each request sees, as `minisgl bench online` does.

    In an open loop (`concurrency` None) sessions, in order, begin at their times, else so many go on at once. At the
    time `lose` the first replica is gone, and what it had not answered is sent again at once.
    """

    def __init__(
        self, replicas: Sequence[Replica], sessions: Iterable[Session], router: Router | None = None,
        hits: Sequence[int] = (), concurrency: int | None = None, seed: int = 0, lose: float | None = None,
        every: int = 1,
    ) -> None:  # fmt: skip
        self.replicas, self.router, self.seed, self.every = replicas, router or round_robin_router(0), seed, every
        self.records: list[RequestRecord] = []
        self.sent_again = 0
        self._hits, self._open = hits, concurrency is None
        self._sessions = iter(sessions)
        self._loads: dict[int, float] = dict.fromkeys(range(len(replicas)), 0)
        self._live: dict[str, _Sent] = {}
        # Heaps: what happens at a time, and the replicas that have work, by the begin of their next step.
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._ready: list[tuple[float, int]] = []
        self._numbers = itertools.count()
        self._done: Callable[[int], object] = lambda count: None
        for _ in range(concurrency or 1):
            self._begin_next(0.0)
        if lose is not None:
            self._at(lose, self._lose)

    def run(self, done: Callable[[int], object]) -> None:
        """Until every request has its answer."""
        self._done = done
        while self._events or self._ready:
            # what comes at the time at which a step begins is in time for it
            if self._events and (not self._ready or self._events[0][0] <= self._ready[0][0]):
                time, _, action = heapq.heappop(self._events)
                action(time)
            else:
                self._step(heapq.heappop(self._ready)[1])

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    def _begin_next(self, time: float) -> None:
        """Let the next session begin, at its own time in an open loop."""
        if (session := next(self._sessions, None)) is None:
            return
        turns: Turns = deque()
        for turn in session.turns:
            index, lengths = len(self.records), (turn.input_length, turn.output_length)
            record = RequestRecord(index, expected_input=lengths[0], expected_output=lengths[1])
            record.expected_cached = self._hits[index % len(self._hits)] if self._hits else 0
            self.records.append(record)
            turns.append((turn, record))
        self._at(session.due if self._open else time, partial(self._send, turns, session.think, first=True))

    def _send(self, turns: Turns, think: float, time: float, first: bool = False) -> None:
        turn, record = turns.popleft()
        record.due = record.sent = time
        vocab = self.replicas[0].model.vocab_size
        prompt = traffic.segment_numbers(self.seed, turn.segments, vocab).astype(np.int32)
        params = turn.sampling or SamplingParams(temperature=0.6, ignore_eos=True)
        seed = record.index if params.seed is None else params.seed
        params = msgspec.structs.replace(params, max_tokens=turn.output_length, seed=seed, logprobs=None)
        request = Request(id=str(record.index), prompt_bytes=prompt.tobytes(), params=params, priority=turn.priority)
        self._route(_Sent(request, record, turns, think), time)
        if first and self._open:
            self._begin_next(time)

    def _route(self, sent: _Sent, time: float) -> None:
        sent.replica = index = self.router(sent.request.prompt_bytes, self._loads)
        replica, self._loads[index] = self.replicas[index], self._loads[index] + 1
        self._live[sent.request.id] = sent
        if not replica.has_work:
            heapq.heappush(self._ready, (max(replica.executor.now, time), index))
        replica.send(sent.request, time)

    def _step(self, index: int) -> None:
        if index not in self._loads:
            return
        replica = self.replicas[index]
        events, time = replica.step(), replica.seen_at
        for event in events:
            sent = self._live[event.id]
            if event.tokens:
                sent.record.times.append(time)
            if event.finish is not None:
                self._at(time, partial(self._finish, sent, event.cached_tokens))
        if replica.has_work:
            heapq.heappush(self._ready, (replica.next_step_at, index))

    def _finish(self, sent: _Sent, cached_tokens: int, time: float) -> None:
        record = sent.record
        if self._live.get(sent.request.id) is not sent:  # it was sent again
            return
        del self._live[sent.request.id]
        self._loads[sent.replica] -= 1
        self._done(1)
        record.prompt_tokens, record.completion_tokens = record.expected_input or 0, len(record.times)
        record.cached_tokens = cached_tokens
        if record.index % self.every:
            record.times, record.thinned = array("d", (record.times[0], record.times[-1])), True
        if sent.turns:
            self._at(time + sent.think, partial(self._send, sent.turns, sent.think))
        elif not self._open:
            self._begin_next(time)

    def _lose(self, time: float) -> None:
        lost = 0
        del self._loads[lost]
        for sent in [sent for sent in self._live.values() if sent.replica == lost]:
            self.sent_again += 1
            sent.record.times = array("d")
            self._route(copy.copy(sent), time)  # what the lost one still finishes is not its answer


class Case(NamedTuple):
    """One simulation: the settings that the user gave, by name, and what they mean."""

    settings: dict[str, Any]
    replica: Replica
    load: Repeated
    concurrency: int | None
    lose: float | None  # when the first replica is lost, s


@cache
def spec_of(config: Config) -> ModelSpec:
    return read_spec(locate_model(config.model, config.model_source, weights=False))


def run(configs: Sequence[tuple[Mapping[str, Any], Config]], options: argparse.Namespace, words: Sequence[str]) -> int:
    """Simulate each configuration, which comes with the settings that the user gave, and report."""
    report = Report("simulate", words, options.json, width=150)
    cases = make_cases(configs, options)
    if options.trace_steps is not None:
        if len(cases) > 1:
            raise ConfigError(f"--trace-steps is of one simulation, and these are {len(cases)}")
        cases[0].replica.engine.observers.append(TraceWriter(options.trace_steps))
    gpus = {case.replica.gpu.name: case.replica.gpu for case in cases}
    report.print(*(f"{gpu.name}: {gpu.source}" for gpu in gpus.values()))
    report.figures |= {"gpus": [msgspec.to_builtins(gpu) for gpu in gpus.values()]}
    names = [name for name in cases[0].settings if len({str(case.settings[name]) for case in cases}) > 1]
    names = names or [load_kind(options)]
    runs, samples = [], []
    total = sum(case.load.times * len(traffic.all_turns(case.load.sessions)) for case in cases)
    gc.collect()
    gc.freeze()
    with progress_bar("Simulating", total, enabled=True) as done:
        while cases:  # a simulation's memory is given back before the next one
            case = cases.popleft()
            values = [(name.replace("_", " "), case.settings[name]) for name in names]
            label = ", ".join(value if isinstance(value, str) else f"{name} {value:g}" for name, value in values)
            found, latencies = simulate(case, options.slo, done)
            runs.append({"label": label, **case.settings, **found})
            samples.append(latencies)
    gc.unfreeze()
    model = slug(configs[0][1].model or spec_of(configs[0][1]).architecture)
    if len(runs) == 1:
        report.print(metrics.latency_table(f"{model}, {label}, simulated", found), *metrics.lines(found))
        report.print(simulation_line(found))
    else:
        report.print(metrics.summary_table(runs))
    report.figures["runs"] = runs
    sweep, title = set(names) <= {load_kind(options), "seed"}, f"{model}, simulated"
    if len(options.replicas) > 1:
        report.finish(lambda figure: draw_fleet(figure, title, runs))
    else:
        report.finish(lambda figure: draw_latencies(figure, title, runs, samples, sweep))
    return 0


def make_cases(configs: Sequence[tuple[Mapping[str, Any], Config]], options: argparse.Namespace) -> deque[Case]:
    """All simulations; raises ConfigError for what cannot run, before anything does."""
    if options.lose != (None,) and 1 in options.replicas:
        raise ConfigError("--lose needs --replicas of at least 2: with one no replica is left")
    kind = load_kind(options)
    loads = [
        (value, seed, traffic.make_sessions(options, kind, value, seed))
        for value, seed in itertools.product(getattr(options, kind), options.seeds)
    ]
    cases: deque[Case] = deque()
    fleets = itertools.product(options.replicas, options.router, options.lose)
    for (chosen, config), name, (value, seed, sessions), (replicas, router, lose) in itertools.product(
        configs, options.gpu, loads, fleets
    ):
        settings = {**chosen, "gpu": Path(name).stem, kind: value, "seed": seed, "replicas": replicas, "router": router}
        settings["lose"] = "lose never" if lose is None else lose
        replica = Replica(spec_of(config), config, read_gpu(name), options.hash_tokens)
        traffic.require_fit(sessions, replica.model.max_seq_len)
        load = Repeated(sessions, options.repeat)
        cases.append(Case(settings, replica, load, value if kind == "concurrency" else None, lose))
    return cases


def simulate(case: Case, slo: Mapping[str, float], done: Callable[[int], object]) -> tuple[dict[str, Any], Any]:
    """The figures of `bench online` and of the simulation itself, and the latencies behind them."""
    replica, settings = case.replica, case.settings
    turns = [turn.segments for turn in traffic.all_turns(case.load.sessions)]
    hits = traffic.expected_hits(turns, replica.config.page_size) if replica.config.cache == "radix" else []
    replicas = [replica, *(replica.another() for _ in range(1, settings["replicas"]))]
    every = 1 + case.load.times * len(turns) // WHOLE_RECORDS
    router = ROUTERS[settings["router"]](settings["seed"])
    clients = Clients(replicas, case.load, router, hits, case.concurrency, settings["seed"], case.lose, every)
    started = time.perf_counter()
    clients.run(done)
    seconds = time.perf_counter() - started
    stats = [each.engine.stats() for each in replicas]
    for each in replicas:
        each.engine.close()
    found = metrics.figures(clients.records, slo)
    seconds_lost = 0.0 if case.lose is None else max(0.0, found["seconds"] - case.lose)
    hours = replica.config.tp * (len(replicas) * found["seconds"] - seconds_lost) / 3600
    found |= {
        "config": {name: getattr(replica.config, name) for name in SHOWN},
        "pages": replica.num_pages,
        "steps": sum(each.steps for each in stats),
        "retracted": sum(each.retracted for each in stats),
        "sent_again": clients.sent_again,
        GPU_HOURS: hours * 1e6 / max(1, found["output_tokens"]),
        "simulation_seconds": seconds,
    }
    return found, metrics.latencies(clients.records)


def simulation_line(found: Mapping[str, Any]) -> str:
    faster = found["seconds"] / max(1e-9, found["simulation_seconds"])
    return (
        f"{found['steps']:,} steps, {found['retracted']:,} retractions, {found['pages']:,} KV pages a replica, "
        f"{found['sent_again']:,} requests sent again, {found[GPU_HOURS]:.3f} GPU hours for a million output tokens; "
        f"simulated in {found['simulation_seconds']:.2f} s, {faster:,.0f} times real time"
    )
