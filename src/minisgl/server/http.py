"""uvicorn under our own rules for starting, stopping and an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from minisgl.errors import ConfigError
from minisgl.server.service import EngineService

GRACE_SECONDS = 5.0
"""How long running requests may go on after the first Ctrl-C; a second one ends them at once."""
ANSWER_SECONDS = 1.0
"""How long requests are still answered, with 503, after the engine has died or was given up."""


class HttpServer(uvicorn.Server):
    """A uvicorn server that says when it listens and leaves the signals to us."""

    def __init__(self, app: ASGIApp, on_listening: Callable[[], None], debug: bool) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=debug, lifespan="off", ws="none", server_header=False)
        )
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so. Raises ConfigError when another process took the port while the model loaded."""
        try:
            await super().startup(sockets)
        except OSError as error:
            raise ConfigError(f"cannot listen on the port any more: {error.strerror}") from error
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the launcher's."""
        yield


async def serve_http(
    server: HttpServer,
    listener: socket.socket,
    service: EngineService,
    engine_ended: asyncio.Future[int],
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> None:
    """Serve until `stop` is set or the engine ends; live requests are answered before this returns.

    After `stop` they may go on for `GRACE_SECONDS`, or until `hurry`; then they end with 503.
    """
    serving = asyncio.create_task(server.serve([listener]))
    stopped, hurried = asyncio.create_task(stop.wait()), asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait((serving, stopped, engine_ended), return_when=asyncio.FIRST_COMPLETED)
        if engine_ended.done():
            await asyncio.wait((serving, stopped), timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        waiters = (serving, hurried, engine_ended)
        await asyncio.wait(waiters, timeout=GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        service.fail("the server is shutting down")
        await asyncio.wait((serving,), timeout=ANSWER_SECONDS)
        server.force_exit = True
        await serving
    finally:
        stopped.cancel()
        hurried.cancel()
