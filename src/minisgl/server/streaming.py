"""Server-sent events, and noticing that the client has left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisgl.errors import MinisglError
from minisgl.server.errors import error_body, internal_error
from minisgl.server.responses import SSE_DONE, sse

T = TypeVar("T")
Chunks = AsyncGenerator[bytes, None]

logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client closed the connection; nobody is left to answer."""


async def disconnected(receive: Receive) -> None:
    """Return when the client leaves; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled and ClientGoneError raised when the client leaves first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await end(task)
        await end(watch)


async def end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()


class EventStream(Response):
    """A response of server-sent events; `first` is the chunk that was waited for before the status was known.

    An error after the headers becomes an event of its own, in the form of an error body. The stream always ends with
    `[DONE]`, unless the client leaves: then `rest` is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: Chunks) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first = first
        self.rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        async with aclosing(self.rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_disconnected(receive, self._send(send))
            except ClientGoneError:
                logger.debug("a client left while its answer was streamed")

    async def _send(self, send: Send) -> None:
        await send_body(send, self.first)
        try:
            async for chunk in self.rest:
                await send_body(send, chunk)
        except MinisglError as error:
            await send_body(send, sse(error_body(error)))
        except Exception:
            logger.exception("a stream failed")
            await send_body(send, sse(error_body(internal_error())))
        await send_body(send, SSE_DONE, more=False)


def send_body(send: Send, chunk: bytes, more: bool = True) -> Awaitable[None]:
    """Send a part of a response's body."""
    return send({"type": "http.response.body", "body": chunk, "more_body": more})


async def stream_response(request: Request, chunks: Chunks) -> Response:
    """A response that streams `chunks`. It begins with the first: what goes wrong before has a status of its own."""
    try:
        first = await unless_disconnected(request.receive, anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)
