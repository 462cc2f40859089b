"""The requests that answer one HTTP request, while the engine has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Protocol

from minisgl.core.types import Request, TokenEvent
from minisgl.errors import MinisglError
from minisgl.server.errors import RequestTimeoutError


class Releasing(Protocol):
    """What a submission asks of the service."""

    def release(self, ids: list[str], finish: str) -> None:
        """Forget these requests and have the engine end them; `finish` is why, for the metrics."""


class Submission:
    """Requests in the engine that answer one HTTP request. Leaving the `with` block aborts what is still live.

    After `timeout` s, if one is given, the requests end and the reader gets RequestTimeoutError.
    """

    def __init__(self, service: Releasing, requests: Sequence[Request], timeout: float | None = None) -> None:
        self._service = service
        self._live = {request.id for request in requests}
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()
        self._error: MinisglError | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            error = RequestTimeoutError(f"the request took longer than the {timeout:g} s this server allows")
            self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, error, "timeout")

    def __enter__(self) -> Submission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(self._live, "abort")
        if self._timer is not None:
            self._timer.cancel()

    def put(self, event: TokenEvent) -> None:
        """Take in an event; called by the service."""
        self._events.append(event)
        if event.finish is not None:
            self._live.discard(event.id)
        self._wake.set()

    def fail(self, error: MinisglError, finish: str) -> None:
        """End everything that is live; the reader gets `error` after what has come already."""
        if self._error is None and self._live:
            self._error = error
            self._release(self._live, finish)
            self._wake.set()

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests in the engine, their answers being complete; no event of them comes any more."""
        ids = set(ids)
        self._release(ids, "stop")
        self._events = [event for event in self._events if event.id not in ids]
        self._wake.set()

    def _release(self, ids: set[str], finish: str) -> None:
        live = self._live & ids
        self._live -= live
        if live:
            self._service.release(sorted(live), finish)

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """Whatever has come since the last look, until every request has ended or was aborted.

        Raises EngineDeadError, RequestTimeoutError or RequestAbortedError when they end in another way first.
        """
        while True:
            if self._events:
                events, self._events = self._events, []
                yield events
            elif self._error is not None:
                raise self._error
            elif self._live:
                self._wake.clear()
                await self._wake.wait()
            else:
                return
