"""What a load test itself costs: whether the client was the bottleneck, and the CPU use of the server's processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import psutil

from minisgl_bench.client import Target
from minisgl_bench.metrics import RequestRecord, spread

BUSY: Final = 0.8  # share of a core from which the client is the bottleneck: Python runs one thread at a time
LATE: Final = 0.010  # lag or lateness at p99, in s, from which the client's timing spoils the figures
BOUND: Final = 0.9  # share of a core from which a thread counts as busy all the time
TICK: Final = 0.01


@dataclass
class ClientUsage:
    """The client's own part: seconds it ran, CPU seconds it took, and by how much (s) its event loop woke too late."""

    seconds: float = 0.0
    cpu: float = 0.0
    lags: array[float] = field(default_factory=lambda: array("d"))


@contextlib.asynccontextmanager
async def watch_client() -> AsyncIterator[ClientUsage]:
    usage, loop = ClientUsage(), asyncio.get_running_loop()

    async def measure() -> None:
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            usage.lags.append(max(0.0, loop.time() - due))

    watching = asyncio.create_task(measure())
    started, cpu = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        usage.seconds, usage.cpu = time.perf_counter() - started, time.process_time() - cpu
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def client_figures(usage: ClientUsage, records: Sequence[RequestRecord], tokens: int) -> dict[str, Any]:
    late = np.array([max(0.0, record.sent - record.due) for record in records if record.sent])
    found = {"event loop lag": spread(np.frombuffer(usage.lags)), "send lateness": spread(late)}
    share = usage.cpu / usage.seconds if usage.seconds else 0.0
    reasons = [
        f"{name} p99 {values['p99']:.1f} ms, above {1e3 * LATE:.0f} ms"
        for name, values in found.items()
        if values and values["p99"] > 1e3 * LATE
    ]
    if share > BUSY:
        reasons.append(f"CPU {share:.2f} of a core, above {BUSY}")
    return {
        "cpu_share": share,
        "cpu_us_per_output_token": 1e6 * usage.cpu / max(1, tokens),
        "event_loop_lag_ms": found["event loop lag"],
        "send_lateness_ms": found["send lateness"],
        "bottleneck": reasons,
    }


@dataclass(frozen=True)
class ProcessCpu:
    name: str
    seconds: float
    threads: dict[int, float]


ProcessTree = dict[int, ProcessCpu]  # by process id


def process_tree(root: int | None) -> ProcessTree:
    found: ProcessTree = {}
    with contextlib.suppress(psutil.Error):
        members = [] if root is None else [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        for member in members:
            with contextlib.suppress(psutil.Error), member.oneshot():
                times, words = member.cpu_times(), member.cmdline() or ["?"]
                name = words[words.index("-m") + 1] if "-m" in words[:-1] else os.path.basename(words[0])
                threads = {thread.id: thread.user_time + thread.system_time for thread in member.threads()}
                found[member.pid] = ProcessCpu(name, times.user + times.system, threads)
    return found


def cores_used(before: ProcessTree, after: ProcessTree, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for pid, now in after.items():
        then = before.get(pid, ProcessCpu(now.name, 0.0, {}))
        threads = [spent - then.threads.get(task, 0.0) for task, spent in now.threads.items()]
        cores, busiest = (now.seconds - then.seconds) / seconds, max(threads, default=0.0) / seconds
        rows.append({"pid": pid, "name": now.name, "cores": cores, "busiest_thread": busiest})
    return sorted(rows, key=lambda row: -row["cores"])


def listener_pid(target: Target) -> int | None:
    local = target.address.startswith("127.") or target.address == "::1"
    found = psutil.net_connections("tcp") if local else []
    return min((c.pid for c in found if c.pid and c.status == "LISTEN" and c.laddr.port == target.port), default=None)


def lines(found: Mapping[str, Any]) -> list[str]:
    return [client_line(found["client"]), *map(server_line, found.get("server_cpu", ()))]


def client_line(client: Mapping[str, Any]) -> str:
    parts = [f"{client['cpu_share']:.2f} of a core ({client['cpu_us_per_output_token']:.0f} µs an output token)"]
    for name, values in (("lag", client["event_loop_lag_ms"]), ("sent late", client["send_lateness_ms"])):
        if values:
            parts.append(f"{name} p99 {values['p99']:.1f} ms")
    verdict = "; ".join(client["bottleneck"])
    head = f"the client was a bottleneck ({verdict})" if verdict else "the client was not the bottleneck"
    return f"{head}: {', '.join(parts)}"


def server_line(row: Mapping[str, Any]) -> str:
    note = ", busy all the time" if row["busiest_thread"] >= BOUND else ""
    text = f"server process {row['pid']} ({row['name']}): {row['cores']:.2f} cores"
    return f"{text}, its busiest thread takes {row['busiest_thread']:.2f}{note}"
