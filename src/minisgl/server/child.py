"""The engine's process, seen from its parent: start it, wait until it is ready, notice its end, end it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from minisgl.config import Config
from minisgl.engine.messages import Ready
from minisgl.errors import EngineDeadError
from minisgl.server.limits import Limits, Queue
from minisgl.server.service import EngineService

ENGINE_COMMAND = (sys.executable, "-m", "minisgl.engine.process")
LAST_WORDS_SECONDS = 0.3
"""How long the last messages of a process that has ended are waited for."""
STOP_SECONDS = 2.0
"""How long a process gets to go by itself, and then after SIGTERM."""
MAX_SOCKET_FOLDER = 80
"""Characters; the path of a Unix socket has at most 107."""


class EngineProcess:
    """A running engine process and the bridge to it. Make one with `start`, end it with `stop`."""

    def __init__(self, process: Process, service: EngineService, folder: Path) -> None:
        self.service = service
        self.folder = folder
        """Where the sockets are; only this user can enter it."""
        self._process = process
        self.ended = asyncio.create_task(self._watch())
        """Done when the process has ended and everyone who waited knows; its exit status."""

    @classmethod
    async def start(cls, config: Config, command: Sequence[str] = ENGINE_COMMAND) -> EngineProcess:
        """Start the process. It has its own session, so that Ctrl-C in the terminal reaches the parent alone."""
        folder = socket_folder()
        to_engine, from_engine = f"ipc://{folder}/to_engine", f"ipc://{folder}/from_engine"
        service = EngineService(to_engine, from_engine, Queue(Limits.of(config)))
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, start_new_session=True)
            assert process.stdin is not None
            start = {"config": config.replace(api_key=()), "to_engine": to_engine, "from_engine": from_engine}
            process.stdin.write(msgspec.json.encode(start) + b"\n")
        except BaseException:
            await service.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(process, service, folder)

    async def ready(self, waiting: Callable[[float], None], every: float = 5.0) -> Ready:
        """Wait until it serves; `waiting` is told every so often (s) for how long (s) that has taken.

        Raises ModelError with what the engine says when it cannot start, EngineDeadError when it just ends.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        ready = asyncio.ensure_future(self.service.ready())
        try:
            while not ready.done():
                await asyncio.wait((ready,), timeout=every)
                if not ready.done():
                    waiting(loop.time() - started)
            return ready.result()
        finally:
            ready.cancel()

    async def stop(self) -> int:
        """End the process: its stdin is closed, then it is told, then made to; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for end in (self._process.terminate, self._process.kill):
            await asyncio.wait((self.ended,), timeout=STOP_SECONDS)
            if self.ended.done():
                break
            with contextlib.suppress(ProcessLookupError):
                end()
        status = await self.ended
        await self.service.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return status

    async def _watch(self) -> int:
        status = await self._process.wait()
        await asyncio.sleep(LAST_WORDS_SECONDS)
        self.service.fail()
        return status


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    return f"signal {signal.Signals(-status).name}"


async def launch_engine(
    config: Config, waiting: Callable[[float], None], command: Sequence[str] = ENGINE_COMMAND
) -> tuple[EngineProcess, Ready]:
    """Start the engine and wait until it is ready. Raises ModelError or EngineDeadError, with the process gone."""
    engine = await EngineProcess.start(config, command)
    try:
        return engine, await engine.ready(waiting)
    except EngineDeadError as error:
        status = describe_status(await engine.stop())
        raise EngineDeadError(f"the engine process ended with {status} before it was ready") from error
    except BaseException:
        await engine.stop()
        raise


def socket_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for sockets."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="minisgl-", dir=folder if len(folder) <= MAX_SOCKET_FOLDER else "/tmp"))
