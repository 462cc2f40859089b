"""A server of our own for the time of a benchmark."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from types import FrameType
from typing import IO, Final, NoReturn

from minisgl.errors import EngineDeadError

POLL_SECONDS: Final = 0.1
STOP_SECONDS: Final = 15.0
TAIL: Final = 2000


@dataclass(frozen=True)
class OwnServer:
    url: str
    pid: int
    start_seconds: float


@contextmanager
def own_server(flags: Sequence[str], key: str | None) -> Iterator[OwnServer]:
    """Start `minisgl` with these flags on a free port, wait until it answers, and end it afterwards.

    Raises EngineDeadError with the end of what it said, when it ends before that.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "minisgl", *flags, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **({"MINISGL_API_KEY": key} if key else {})}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log, ended_by_sigterm():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while not answers(port):
                require_running(process, log)
                time.sleep(POLL_SECONDS)
            yield OwnServer(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - started)
            require_running(process, log)
        finally:
            process.terminate()  # as a user would
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
    with closing(HTTPConnection("127.0.0.1", port, timeout=5.0)) as connection, suppress(OSError, HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def require_running(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    if process.poll() is not None:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        said = log.read().decode(errors="replace").strip()
        raise EngineDeadError(f"the server ended with status {process.returncode}: {said}")
