"""What the benchmark itself costs, and what the server's processes do meanwhile, by Linux's accounts (proc(5))."""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from minisgl.bench.online.http1 import Target

TICK: Final = 0.01
LISTEN: Final = "0A"
CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Client:
    """The client's own part: seconds it ran, CPU seconds it took, and by how much (s) its event loop woke too late."""

    seconds: float = 0.0
    cpu: float = 0.0
    lags: array[float] = field(default_factory=lambda: array("d"))


@asynccontextmanager
async def watch_client() -> AsyncIterator[Client]:
    """Watch this process and its event loop."""
    client = Client()

    async def measure() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            client.lags.append(max(0.0, loop.time() - due))

    watching = asyncio.create_task(measure())
    started, cpu = time.perf_counter(), time.process_time()
    try:
        yield client
    finally:
        client.seconds, client.cpu = time.perf_counter() - started, time.process_time() - cpu
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@dataclass(frozen=True)
class Cpu:
    """CPU seconds of a process, and of each of its threads."""

    name: str
    seconds: float
    threads: dict[int, float]


def process_tree(root: int) -> dict[int, Cpu]:
    """A process and all its descendants; those that end while this looks are left out."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (fields := stat_fields(folder / "stat")):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: dict[int, Cpu] = {}
    todo = [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, ())
        folder = Path(f"/proc/{pid}")
        if fields := stat_fields(folder / "stat"):
            found[pid] = Cpu(process_name(folder), cpu_seconds(fields), thread_seconds(folder / "task"))
    return found


def stat_fields(path: Path) -> list[str]:
    """The fields of a `stat` file behind the process's name; none where it has ended."""
    try:
        return path.read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_seconds(fields: list[str]) -> float:
    """User and system time."""
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def thread_seconds(folder: Path) -> dict[int, float]:
    """CPU seconds of each thread."""
    try:
        tasks = [int(path.name) for path in folder.iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {task: cpu_seconds(fields) for task in tasks if (fields := stat_fields(folder / str(task) / "stat"))}


def process_name(folder: Path) -> str:
    """What a process runs: the module behind `-m`, or the program's name."""
    try:
        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return "?"
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return os.path.basename(words[0]) or "?"


def used(before: dict[int, Cpu], after: dict[int, Cpu], seconds: float) -> list[dict[str, str | int | float]]:
    """Cores that each process used over so many seconds, and those of its busiest thread, the busiest process first."""
    rows: list[dict[str, str | int | float]] = []
    for pid, now in after.items():
        then = before.get(pid, Cpu(now.name, 0.0, {}))
        threads = [spent - then.threads.get(task, 0.0) for task, spent in now.threads.items()]
        rows.append(
            {
                "pid": pid,
                "name": now.name,
                "cores": (now.seconds - then.seconds) / seconds,
                "busiest_thread": max(threads, default=0.0) / seconds,
            }
        )
    return sorted(rows, key=lambda row: -float(row["cores"]))


def listener_pid(target: Target) -> int | None:
    """The process of ours that listens on a local server's port; None where it is not found."""
    if not target.is_local:
        return None
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == target.port:
                inodes.add(f"socket:[{fields[9]}]")
    holders = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            links = {os.readlink(path) for path in (folder / "fd").iterdir()}
        except OSError:  # another user's, or it has ended
            continue
        if links & inodes:
            holders.append(int(folder.name))
    return min(holders, default=None)
