"""The engine as the HTTP side sees it: an asyncio bridge over two sockets to the engine's process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from minisgl.engine.messages import Abort, Add, Events, Failed, FromEngine, Ping, Pong, Ready, ToEngine
from minisgl.errors import EngineDeadError, InvalidRequestError, ModelError
from minisgl.server.errors import OverloadedError
from minisgl.types import EngineStats, Request, TokenEvent

MAX_LIVE_REQUESTS = 4096
"""Requests that wait or run at a time; more are turned away rather than queued without bound."""

ENGINE_DIED = "the engine ended; nothing can be generated until the server is started again"

logger = logging.getLogger(__name__)


class Submission:
    """Requests in the engine that answer one HTTP request. Leaving the `with` block aborts what is still live."""

    def __init__(self, service: EngineService, requests: Sequence[Request]) -> None:
        self._service = service
        self._live = {request.id for request in requests}
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()

    def __enter__(self) -> Submission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort(list(self._live))

    def put(self, event: TokenEvent) -> None:
        """Take in an event; called by the service."""
        self._events.append(event)
        if event.finish is not None:
            self._live.discard(event.id)
        self._wake.set()

    def wake(self) -> None:
        """Let the reader look at the service's state."""
        self._wake.set()

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests in the engine; no event of them comes any more."""
        live = self._live.intersection(ids)
        self._live -= live
        self._events = [event for event in self._events if event.id not in live]
        self._service.release(sorted(live))
        self._wake.set()

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """Whatever has come since the last look, until every request has ended or was aborted.

        Raises EngineDeadError when the engine dies first.
        """
        while self._live or self._events:
            await self._wake.wait()
            self._wake.clear()
            events, self._events = self._events, []
            if events:
                yield events
            if self._live and not self._events and self._service.dead is not None:
                raise self._service.dead


class EngineService:
    """Both sockets, the requests that are live, and whether the engine is. Belongs to one event loop.

    It binds the sockets and the engine's process connects, so either may be first. No queue here is without bound:
    `max_live` requests at most are live, and none has more than its `max_tokens` tokens waiting.
    """

    def __init__(self, to_engine: str, from_engine: str, max_live: int = MAX_LIVE_REQUESTS) -> None:
        self.dead: EngineDeadError | None = None
        self.max_live = max_live
        self._submissions: dict[str, Submission] = {}
        self._pings: dict[int, asyncio.Future[EngineStats]] = {}
        self._nonces = itertools.count(1)
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        # Sending never waits: there is no high-water mark, and a missing peer is an error.
        self._outbox = self._context.socket(zmq.PUSH)
        self._inbox = zmq.asyncio.Context.shadow(self._context).socket(zmq.PULL)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._outbox.setsockopt(option, 0)
            self._inbox.setsockopt(option, 0)
        self._outbox.bind(to_engine)
        self._inbox.bind(from_engine)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._receiver = asyncio.create_task(self._receive())

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._submissions)

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Give requests to the engine, all or none. Raises EngineDeadError, OverloadedError, InvalidRequestError."""
        if self.dead is not None:
            raise self.dead
        if len(requests) > self.max_live:
            raise InvalidRequestError(f"at most {self.max_live} prompts fit in one request", param="prompt")
        if self.num_live + len(requests) > self.max_live:
            raise OverloadedError(f"{self.num_live} requests are live already; try again later")
        submission = Submission(self, requests)
        for request in requests:
            self._submissions[request.id] = submission
        try:
            for request in requests:
                self._send(Add(request))
        except BaseException:
            submission.abort([request.id for request in requests])
            raise
        return submission

    def release(self, ids: list[str]) -> None:
        """Forget these requests and have the engine end them."""
        for request_id in ids:
            self._submissions.pop(request_id, None)
        if ids and self.dead is None:
            with contextlib.suppress(EngineDeadError):  # then there is nothing left to abort
                self._send(Abort(ids))

    async def ping(self, timeout: float) -> EngineStats:
        """The engine's counts, from between two steps; raises EngineDeadError when they do not come in time (s)."""
        if self.dead is not None:
            raise self.dead
        nonce = next(self._nonces)
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._pings[nonce] = answer
        try:
            self._send(Ping(nonce))
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError as error:
            raise EngineDeadError(f"the engine did not answer within {timeout:g} s") from error
        finally:
            del self._pings[nonce]

    async def ready(self) -> Ready:
        """Wait for the engine to have loaded its model; raises ModelError with what it says when it cannot.

        Raises EngineDeadError when it ended without a word.
        """
        ready = await asyncio.shield(self._ready)
        while self.dead is None and not self._outbox.poll(0, zmq.POLLOUT):
            await asyncio.sleep(0.01)
        return ready

    def fail(self, message: str = ENGINE_DIED) -> None:
        """Everyone who waits gets EngineDeadError, now and from here on."""
        if self.dead is not None:
            return
        self.dead = EngineDeadError(message)
        for submission in set(self._submissions.values()):
            submission.wake()
        self._submissions.clear()
        waiters: list[asyncio.Future[Any]] = [self._ready, *self._pings.values()]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(self.dead)

    async def close(self) -> None:
        """Stop listening and close the sockets."""
        self.fail("the server is shutting down")
        self._receiver.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        if not self._ready.cancelled():
            self._ready.exception()  # nobody may have asked
        self._inbox.close()
        self._outbox.close()
        self._context.term()

    def _send(self, message: ToEngine) -> None:
        try:
            self._outbox.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.fail()
            raise EngineDeadError(ENGINE_DIED) from None

    async def _receive(self) -> None:
        try:
            while True:
                self._dispatch(self._decoder.decode(await self._inbox.recv()))
        except Exception:
            logger.exception("what the engine sends cannot be read")
            self.fail()

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Events(events):
                for event in events:
                    if event.finish is not None:
                        submission = self._submissions.pop(event.id, None)
                    else:
                        submission = self._submissions.get(event.id)
                    if submission is not None:
                        submission.put(event)
            case Pong(nonce, stats):
                answer = self._pings.get(nonce)
                if answer is not None and not answer.done():
                    answer.set_result(stats)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Failed(error):
                self._on_failed(error)

    def _on_failed(self, error: str) -> None:
        if self._ready.done():
            logger.error("the engine failed: %s", error)
        else:
            self._ready.set_exception(ModelError(error))
        self.fail()
