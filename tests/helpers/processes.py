"""The program as a user starts it, and its processes as the system sees them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

MINISGL = (sys.executable, "-m", "minisgl")
BOUND = 10.0  # s that a test waits for what is promised within two; what hangs takes longer: the server drains for 30 s


def environment(**changes: str) -> dict[str, str]:
    """For a process that runs a module of `helpers`: this process' environment, with the tests' folder on the path."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **changes}


@contextmanager
def server(*flags: str, command: Sequence[str] = MINISGL) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its URL, once it is ready."""
    command = [*command, "--port", "0", "--num-pages", "256", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def children(pid: int) -> list[int]:
    """Child processes, without those that render chat templates."""
    found, module = [child.pid for child in psutil.Process(pid).children()], b"minisgl.text.template_process"
    return sorted(child for child in found if module not in command_line(child))


def command_line(pid: int) -> bytes:
    """Empty for a process that has just ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], bound: float = BOUND) -> None:
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_gone(pids: Iterable[int]) -> None:
    wait_for(lambda: not any(map(alive, pids)))
