"""Clients' connections on their way from the process that accepts them to the one that serves them.

One process accepts and gives each connection to the API process that has the fewest. Were all to accept from one
listening socket, whichever wakes first would take every connection of a burst; with a socket each (SO_REUSEPORT) the
kernel deals them out by a hash of the addresses, to a process that hangs as well, and two servers could share a port
unawares. A connection is a file descriptor in a message on a Unix socket (SCM_RIGHTS, unix(7)); what flows through it
later never touches the process that accepted it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from minisgl.config import Config
from minisgl.server.http import HttpServer
from minisgl.server.wire import BoundedProtocol

logger = logging.getLogger(__name__)


def channel() -> tuple[socket.socket, socket.socket]:
    """Two ends, neither of which blocks; each message on it is one connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def hand_over(connection: socket.socket, end: socket.socket) -> bool:
    """Give a connection to the process at the other end; whether there was room for it and somebody to take it."""
    try:
        socket.send_fds(end, [b"c"], [connection.fileno()])
    except OSError:  # full, which is a process that hangs; or gone
        return False
    return True


class CountedProtocol(BoundedProtocol):
    """A connection whose end is noted."""

    def __init__(self, *args: Any, on_lost: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_lost = on_lost

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        self._on_lost()


class HandedServer(HttpServer):
    """A server of connections that come through one end of a `channel`; `on_closed` is told of each that is over."""

    def __init__(
        self,
        app: ASGIApp,
        on_serving: Callable[[], None],
        config: Config,
        end: socket.socket,
        on_closed: Callable[[], None],
    ) -> None:
        super().__init__(app, on_serving, config)
        self._end = end
        self._on_closed = on_closed
        self._starting: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take what comes."""
        await super().startup([])
        asyncio.get_running_loop().add_reader(self._end, self._take)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing any more; whoever is still on the way finds the connection closed."""
        asyncio.get_running_loop().remove_reader(self._end)
        self._end.close()
        await super().shutdown([])

    def _take(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._end, 1, 1)
            except BlockingIOError:
                return
            if not data:
                asyncio.get_running_loop().remove_reader(self._end)
                return
            if not descriptors:  # no room for another open file
                logger.warning("a connection is closed at once: too many files are open")
                self._on_closed()
            for descriptor in descriptors:
                task = asyncio.create_task(self._start(socket.socket(fileno=descriptor)))
                self._starting.add(task)
                task.add_done_callback(self._starting.discard)

    async def _start(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        counted = CountedOnce(self._on_closed)
        protocol = functools.partial(
            CountedProtocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            write_timeout=self.write_timeout,
            on_lost=counted,
        )
        try:
            await asyncio.get_running_loop().connect_accepted_socket(protocol, connection, ssl=self.config.ssl)
        except OSError as error:  # a TLS handshake that failed, or a client that left before it
            logger.debug("a connection ended before it began: %s", error)
            connection.close()
            counted()


class CountedOnce:
    """Calls a function the first time that it is called itself."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        """Call it, unless it was."""
        if self._function is not None:
            function, self._function = self._function, None
            function()
