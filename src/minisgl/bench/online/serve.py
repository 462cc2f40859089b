"""A server of our own for the time of a benchmark."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from types import FrameType
from typing import IO, Final, NoReturn

from minisgl.errors import EngineDeadError

POLL_SECONDS: Final = 0.1
STOP_SECONDS: Final = 15.0
TAIL: Final = 2000


@dataclass(frozen=True)
class Served:
    """Where the server is, and how long it took to its first answer, in s."""

    url: str
    pid: int
    start_seconds: float


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def own_server(flags: Sequence[str], key: str | None) -> Iterator[Served]:
    """Start `minisgl` with these flags on a free port, wait until it answers, and end it afterwards.

    Raises EngineDeadError with the end of what it said, when it ends before that.
    """
    port = free_port()
    command = [sys.executable, "-m", "minisgl", *flags, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **({"MINISGL_API_KEY": key} if key else {})}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log, ended_by_sigterm():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while not answers(port):
                if process.poll() is not None:
                    raise EngineDeadError(f"the server ended with status {process.returncode}: {last_words(log)}")
                time.sleep(POLL_SECONDS)
            yield Served(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - started)
            if process.poll() is not None:
                raise EngineDeadError(f"the server ended with status {process.returncode}: {last_words(log)}")
        finally:
            stop(process)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While inside, SIGTERM unwinds the stack as Ctrl-C does, so that the server does not outlive the benchmark."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def answers(port: int) -> bool:
    """Whether the server says that it is well."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server as a user would; make it end when it does not."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(log: IO[bytes]) -> str:
    """The end of what the server said."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL))
    return log.read().decode(errors="replace").strip()
