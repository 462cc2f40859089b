"""The program as a user starts it, and its processes as the system sees them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

MINISGL = (sys.executable, "-m", "minisgl")
BOUND = 10.0
"""Seconds that a test waits for what is promised within two, on a machine that does other things beside the tests.

What hangs takes longer: the server drains for 30 s, and clients here wait for as long."""


def environment(**changes: str) -> dict[str, str]:
    """For a process that runs a module of `helpers`: this process' environment, with the tests' folder on the path."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **changes}


@contextmanager
def server(*flags: str, command: Sequence[str] = MINISGL) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its URL, once it is ready."""
    process = subprocess.Popen(
        [*command, "--port", "0", "--num-pages", "256", *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := re.search(r"is ready.*(http://\S+)/v1", line):
                yield process, match[1]
                break
        else:
            pytest.fail(f"the server ended with {process.wait()} before it was ready")
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Processes that come from `pid`, at whatever remove."""
    found = children(pid)
    return found + [late for child in found for late in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_gone(pids: Iterable[int]) -> None:
    wait_for(lambda: not any(map(alive, pids)))
