"""The engine process's own loop in a thread, over a simulated device: real scheduler, cache and messages."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from helpers.serving import Web, web
from helpers.simulation import simulated_engine
from minisgl.build import Built
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import Executor, StepResult
from minisgl.core.request_state import ConstraintFactory
from minisgl.server import engine_process, ipc
from minisgl.server.engine_process import EngineServer
from minisgl_bench.profile import Recorder


class FailingExecutor(Recorder):
    """Raises when step `n` is collected."""

    def __init__(self, executor: Executor, n: int) -> None:
        super().__init__(executor)
        self.n = n

    def collect(self) -> StepResult:
        result = super().collect()
        if result.step == self.n:
            raise RuntimeError(f"forward pass {self.n} failed, says the test")
        return result


class EngineThread:
    """An engine on a thread; `failure` is what ended it, if something did. `folder` has the tokenizer."""

    def __init__(self, engine: Engine, folder: Path = Path("/nowhere"), config: Config | None = None) -> None:
        self.engine = engine
        self.built = Built(engine, folder, ())
        self.config = config or Config()
        self.failure: BaseException | None = None
        self.gone = threading.Event()
        self.thread: threading.Thread | None = None

    def run(self, sockets: str) -> None:
        try:
            with patch.object(engine_process, "build_engine", lambda config, **options: self.built):
                EngineServer(ipc.EngineSetup(self.config, sockets), self.gone).run()
        except RuntimeError as error:
            self.failure = error

    @contextlib.asynccontextmanager
    async def start(self, sockets: str) -> AsyncIterator[None]:
        self.thread = threading.Thread(target=self.run, args=(sockets,))
        self.thread.start()
        try:
            yield
        finally:
            self.gone.set()
            await asyncio.to_thread(self.thread.join, 10)
            assert not self.thread.is_alive()


@contextlib.asynccontextmanager
async def simulated(
    folder: Path,
    *,
    fail_at: int | None = None,
    constraints: ConstraintFactory | None = None,
    flags: dict[str, Any] | None = None,
    **settings: object,
) -> AsyncIterator[tuple[Web, EngineThread]]:
    """Serve an engine over a simulated device; `settings` are the engine's."""
    engine = simulated_engine(**settings)  # type: ignore[arg-type]
    engine.constraints = constraints
    if fail_at is not None:
        engine.executor = FailingExecutor(engine.executor, fail_at)
    flags = flags or {}
    thread = EngineThread(engine, folder, Config(**flags))
    async with web(folder, engine.model, thread.start, max_live=4096, **flags) as side:
        yield side, thread
