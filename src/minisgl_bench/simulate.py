"""`minisgl simulate`: a load test of the engine in virtual time, for every combination of the settings asked for."""

import argparse
import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.errors import ConfigError
from minisgl.formats.hub import locate_model, progress_bar
from minisgl.trace import TraceWriter
from minisgl_bench import metrics, traffic
from minisgl_bench.command import load_kind
from minisgl_bench.cost_model import read_gpu
from minisgl_bench.report import GPU_HOURS, Report, draw_fleet, draw_latencies, slug
from minisgl_bench.simulation import ROUTERS, WHOLE_RECORDS, Clients, Replica
from minisgl_bench.traffic import Repeated

SHOWN: Final = ("tp", "dtype", "max_running_requests", "max_prefill_length", "schedule_policy", "page_size", "cache")


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
