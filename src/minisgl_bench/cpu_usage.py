"""What the benchmark's own process costs, and what the server's processes do meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from array import array
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

from minisgl_bench.client import Target

TICK: Final = 0.01


@dataclass
class ClientUsage:
    """The client's own part: seconds it ran, CPU seconds it took, and by how much (s) its event loop woke too late."""

    seconds: float = 0.0
    cpu: float = 0.0
    lags: array[float] = field(default_factory=lambda: array("d"))


@asynccontextmanager
async def watch_client() -> AsyncIterator[ClientUsage]:
    usage = ClientUsage()

    async def measure() -> None:
        loop = asyncio.get_running_loop()
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


@dataclass(frozen=True)
class ProcessCpu:
    name: str
    seconds: float
    threads: dict[int, float]


def process_tree(root: int) -> dict[int, ProcessCpu]:
    """A process and all its descendants; those that end meanwhile are left out."""
    found: dict[int, ProcessCpu] = {}
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(root)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error), member.oneshot():
                times = member.cpu_times()
                threads = {thread.id: thread.user_time + thread.system_time for thread in member.threads()}
                found[member.pid] = ProcessCpu(process_name(member.cmdline()), times.user + times.system, threads)
    return found


def process_name(words: list[str]) -> str:
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return os.path.basename(words[0]) if words else "?"


def cores_used(
    before: Mapping[int, ProcessCpu], after: Mapping[int, ProcessCpu], seconds: float
) -> list[dict[str, Any]]:
    """Cores that each process used over so many seconds, and those of its busiest thread, the busiest process first."""
    rows = []
    for pid, now in after.items():
        then = before.get(pid, ProcessCpu(now.name, 0.0, {}))
        threads = [spent - then.threads.get(task, 0.0) for task, spent in now.threads.items()]
        cores, busiest = (now.seconds - then.seconds) / seconds, max(threads, default=0.0) / seconds
        rows.append({"pid": pid, "name": now.name, "cores": cores, "busiest_thread": busiest})
    return sorted(rows, key=lambda row: -row["cores"])


def listener_pid(target: Target) -> int | None:
    found = psutil.net_connections("tcp") if target.is_local else []
    return min((c.pid for c in found if c.pid and c.status == "LISTEN" and c.laddr.port == target.port), default=None)
