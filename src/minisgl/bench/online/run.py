"""One `minisgl bench online` from the first probe to the report."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from minisgl.bench.online.client import Record
from minisgl.bench.online.curves import draw_curves
from minisgl.bench.online.drive import Client, closed_loop, open_loop, prepare
from minisgl.bench.online.metrics import client_figures, e2e, figures, latencies, tpot, ttft
from minisgl.bench.online.options import Load, Options, loads
from minisgl.bench.online.serve import Served, own_server
from minisgl.bench.online.sessions import Session, all_turns, require_fit
from minisgl.bench.online.setup import TRACE_REQUESTS, make_client, make_sessions, warm_up
from minisgl.bench.online.tables import latency_table, lines, summary_table
from minisgl.bench.online.tokens import expected_hits
from minisgl.bench.online.traces import read_trace
from minisgl.bench.online.watch import listener_pid, process_tree, used, watch_client
from minisgl.bench.report import RESULTS, default_path, require_writable, slug, write_report
from minisgl.core.weights import progress_bar

NAME: Final = "online"
WIDTH: Final = 130
"""Columns of a table; a terminal that has fewer wraps lines."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All runs: their figures and, for the pictures, their latencies."""

    model: str
    runs: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def run(options: Options, arguments: Sequence[str]) -> int:
    """Measure all loads with all seeds, print, and write the report; 1 when a request failed."""
    on_gpu = torch.cuda.is_available()
    require_writable(options.json or (RESULTS / f"{NAME}.json" if on_gpu else None))
    require_writable(options.samples, "--samples")
    if options.trace is not None:
        read_trace(options.trace, options.requests or TRACE_REQUESTS)  # what is wrong is said before a server starts
    options = dataclasses.replace(
        options,
        small=options.server is not None and not on_gpu,
        salt=secrets.randbits(32) if options.salt is None else options.salt,
    )
    console = Console(width=max(WIDTH, Console().width), soft_wrap=True)
    with contextlib.ExitStack() as stack:
        served = None
        if options.server is not None:
            console.print(f"starting minisgl {' '.join(options.server)} …", highlight=False, markup=False)
            served = stack.enter_context(own_server(options.server, options.api_key))
            console.print(f"it answers after {served.start_seconds:.1f} s", highlight=False)
            options = dataclasses.replace(options, url=served.url, server_pid=served.pid)
        outcome = asyncio.run(measure(options, console))
        # Before the server is ended: where it has ended by itself that is an error.
        if len(outcome.runs) > 1:
            console.print(summary_table(outcome.runs))
        path = options.json or (default_path(outcome.model, benchmark(options)) if on_gpu else None)
        if path is not None:
            write(path, options, arguments, served, outcome, console)
    return 1 if any(found["failed"] for found in outcome.runs) else 0


def benchmark(options: Options) -> str:
    """What a report of these options is called."""
    source = options.trace.stem if options.trace is not None else "chats" if options.chats is not None else "lengths"
    return f"{NAME}-{slug(source)}-{loads(options)[0].kind}"


def write(
    path: Path, options: Options, arguments: Sequence[str], served: Served | None, outcome: Outcome, console: Console
) -> None:
    """Write the report and the pictures."""
    report: dict[str, Any] = {"model": outcome.model, "salt": options.salt, "runs": outcome.runs}
    if served is not None:
        report["start_to_ready_seconds"] = served.start_seconds
    write_report(path, NAME, arguments, report)
    picture = path.with_suffix(".png")
    drawn = draw_curves(picture, f"{slug(outcome.model)} online", outcome.runs, outcome.samples)
    told = f" and {picture}" if drawn else "; a picture needs minisgl[plot]"
    console.print(f"written to {path}{told}", highlight=False, markup=False)


async def measure(options: Options, console: Console) -> Outcome:
    """All runs. Raises ConfigError when the server cannot be used."""
    client, limit = await make_client(options)
    outcome = Outcome(client.model, [], [])
    for load in loads(options):
        for seed in options.seeds:
            sessions = make_sessions(options, load, seed)
            require_fit(sessions, limit)
            number = len(outcome.runs)
            if not number:
                await warm_up(client, sessions, options.warmup)
            found, records = await measure_one(client, options, load, seed, number, sessions)
            outcome.runs.append(found)
            outcome.samples.append(latencies([record for record in records if record.failure is None]))
            console.print(latency_table(f"{client.model}, {found['label']}", found))
            for line in lines(found):
                console.print(line, highlight=False, markup=False)
            if options.samples is not None:
                write_samples(options.samples, found["label"], records, append=number > 0)
    return outcome


async def measure_one(
    client: Client, options: Options, load: Load, seed: int, number: int, sessions: Sequence[Session]
) -> tuple[dict[str, Any], list[Record]]:
    """One run. No run's tokens are another's, so that none finds its prompts cached."""
    hits = expected_hits((turn.segments for turn in all_turns(sessions)), options.page_size)
    mixed = hash((options.salt, seed, number))
    planned = prepare(client, sessions, mixed, hits)
    records = [record for item in planned for record in item.records]
    pid = options.server_pid or listener_pid(client.target)
    gc.collect()
    gc.freeze()
    with progress_bar(load.label, len(records), enabled=True) as done:
        before = process_tree(pid) if pid is not None else {}
        async with watch_client() as watched:
            if load.kind == "concurrency":
                await closed_loop(client, planned, mixed, int(load.value), done)
            else:
                await open_loop(client, planned, mixed, done)
        after = process_tree(pid) if pid is not None else {}
    gc.unfreeze()
    found = {
        "label": load.label if len(options.seeds) == 1 else f"{load.label}, seed {seed}",
        load.kind: load.value,
        "seed": seed,
        **figures(records, options.slo),
    }
    found["client"] = client_figures(watched, records, found["output_tokens"])
    if after:
        found["server_cpu"] = used(before, after, watched.seconds)
    return found, records


def write_samples(path: Path, label: str, records: Sequence[Record], append: bool) -> None:
    """A line of JSON for each request, times in s after the run's first."""
    start = min((record.sent for record in records if record.sent), default=0.0)
    with path.open("a" if append else "w") as file:
        for record in records:
            row: dict[str, Any] = {"run": label, "index": record.index, "failure": record.failure}
            if record.failure is None:
                row |= {
                    "due": record.due - start,
                    "sent": record.sent - start,
                    "prompt_tokens": record.prompt_tokens,
                    "completion_tokens": record.completion_tokens,
                    "cached_tokens": record.cached_tokens,
                    "expected_cached_tokens": record.expected_cached,
                    "ttft": ttft(record),
                    "tpot": tpot(record),
                    "e2e": e2e(record),
                }
            else:
                row["detail"] = record.detail
            file.write(json.dumps(row) + "\n")
