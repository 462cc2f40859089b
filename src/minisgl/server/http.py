"""uvicorn under our own rules for starting, draining and an engine that dies."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from minisgl.config import Config
from minisgl.server.listen import listen
from minisgl.server.service import EngineService
from minisgl.server.wire import BoundedProtocol

ANSWER_SECONDS = 1.0
"""How long requests are still answered, with 503, after the engine has died or was given up."""

logger = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """A uvicorn server that says when it listens and leaves the signals to us."""

    def __init__(self, app: ASGIApp, on_listening: Callable[[], None], config: Config) -> None:
        protocol = functools.partial(BoundedProtocol, write_timeout=config.write_timeout)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
            )
        )
        self.write_timeout = config.write_timeout
        """Seconds a client may leave unread what it was sent."""
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so. Raises ConfigError when another process took the port while the model loaded."""
        for listener in sockets or ():
            listen(listener, self.write_timeout)
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the launcher's."""
        yield


async def serve_http(
    server: HttpServer,
    listeners: Sequence[socket.socket],
    service: EngineService,
    engine_ended: asyncio.Future[Any],
    stop: asyncio.Event,
    hurry: asyncio.Event,
    drain_timeout: float,
) -> None:
    """Serve until `stop` is set or the engine ends; live requests are answered before this returns.

    After `stop` they may go on for `drain_timeout` s, or until `hurry`, while new ones get 503; then they end with 503.
    """
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(server.serve(list(listeners)))
    stopped, hurried = asyncio.create_task(stop.wait()), asyncio.create_task(hurry.wait())
    drained: asyncio.Task[None] | None = None
    try:
        await asyncio.wait((serving, stopped, engine_ended), return_when=asyncio.FIRST_COMPLETED)
        deadline = loop.time() + drain_timeout
        if engine_ended.done():
            await asyncio.wait((serving, stopped), timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        elif stopped.done():
            drained = asyncio.create_task(service.drain())
            over = (drained, serving, hurried, engine_ended)
            await asyncio.wait(over, timeout=drain_timeout, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                logger.warning("%d requests are cut short", service.num_live)
                service.fail("the server is shutting down")
        server.should_exit = True
        last_bytes = max(ANSWER_SECONDS, deadline - loop.time()) if drained and service.dead is None else ANSWER_SECONDS
        await asyncio.wait((serving, hurried), timeout=last_bytes, return_when=asyncio.FIRST_COMPLETED)
        server.force_exit = True
        await serving
    finally:
        for task in (stopped, hurried, drained):
            if task is not None:
                task.cancel()
