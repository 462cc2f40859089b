"""The engine as the HTTP side sees it: an asyncio bridge over two sockets to the engine's process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from minisgl.core.types import EngineStats, Request
from minisgl.engine.messages import (
    Abort,
    Add,
    Events,
    Failed,
    Flush,
    Flushed,
    FromEngine,
    Ping,
    Pong,
    Ready,
    ToEngine,
)
from minisgl.errors import EngineDeadError, ModelError
from minisgl.server.errors import DrainingError, RequestAbortedError, RetryLaterError
from minisgl.server.limits import Limits, Queue
from minisgl.server.metrics import Metrics
from minisgl.server.records import EXCHANGE, Live
from minisgl.server.submission import Submission

ENGINE_DIED = "the engine ended; nothing can be generated until the server is started again"
DRAIN_RETRY_SECONDS = 5
"""When a client that is turned away by a server going down is told to try again: another one may answer then."""

T = TypeVar("T", Pong, Flushed)

logger = logging.getLogger(__name__)


class EngineService:
    """Both sockets, the requests that are live, and whether the engine is. Belongs to one event loop.

    It binds the sockets and the engine's process connects, so either may be first. No queue here is without bound:
    `queue` says how many requests may be live, and none has more than its `max_tokens` tokens waiting. `link` is the
    number that the engine knows this process by.
    """

    def __init__(self, to_engine: str, from_engine: str, queue: Queue | None = None, link: int = 0) -> None:
        self.dead: EngineDeadError | None = None
        self.draining = False
        self.queue = queue or Queue(Limits())
        self.limits = self.queue.limits
        self.link = link
        self.metrics = Metrics()
        self.stats = EngineStats()
        """The engine's counts when it last answered."""
        self._live: dict[str, Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._answers: dict[int, asyncio.Future[Any]] = {}
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
        return len(self._live)

    @property
    def max_live(self) -> int:
        """Requests that may be live at a time."""
        return self.limits.live

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Give requests to the engine, all or none.

        Raises EngineDeadError, DrainingError, OverloadedError, QueueFullError or InvalidRequestError.
        """
        if self.dead is not None:
            raise self.dead
        try:
            if self.draining:
                raise DrainingError("the server is shutting down", DRAIN_RETRY_SECONDS)
            self.queue.check(requests)
        except RetryLaterError as error:
            self.metrics.on_rejected(str(error.code))
            raise
        exchange = EXCHANGE.get()
        arrived = time.monotonic() if exchange is None else exchange.started
        submission = Submission(self, requests, self.limits.request_timeout)
        for request in requests:
            live = self._live[request.id] = Live(request, submission, arrived)
            self.queue.enter(live.prompt_tokens)
            if exchange is not None:
                exchange.choices.append(live)
        self._idle.clear()
        try:
            for request in requests:
                self._send(Add(request, self.link))
        except EngineDeadError as error:
            submission.fail(error, "error")
            raise
        return submission

    def release(self, ids: list[str], finish: str) -> None:
        """Forget these requests and have the engine end them; `finish` is why, for the metrics."""
        now = time.monotonic()
        for request_id in ids:
            if (live := self._live.get(request_id)) is not None:
                self._end(live, finish, now)
        if ids:
            self.send(Abort(ids))

    def abort(self, answer_id: str | None) -> int:
        """End the requests of the answer with this id, or all (None); how many those were."""
        found = [
            live
            for live in self._live.values()
            if answer_id is None or live.id == answer_id or live.id.rpartition("-")[0] == answer_id
        ]
        error = RequestAbortedError("the operator ended this request")
        for submission in {live.submission for live in found}:
            submission.fail(error, "abort")
        return len(found)

    async def drain(self) -> None:
        """Take no request any more, and wait until the last one has ended."""
        self.draining = True
        await self._idle.wait()

    async def ping(self, timeout: float) -> EngineStats:
        """The engine's counts, from between two steps; raises EngineDeadError when they do not come in time (s)."""
        self.stats = (await self._ask(Ping, Pong, timeout)).stats
        return self.stats

    async def flush_cache(self, timeout: float) -> int:
        """Drop what no request uses from the prefix cache; the pages freed. Raises EngineDeadError as `ping` does."""
        return (await self._ask(Flush, Flushed, timeout)).pages

    async def _ask(self, question: Callable[[int, int], ToEngine], kind: type[T], timeout: float) -> T:
        if self.dead is not None:
            raise self.dead
        nonce = next(self._nonces)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._answers[nonce] = answer
        try:
            self._send(question(nonce, self.link))
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError as error:
            raise EngineDeadError(f"the engine did not answer within {timeout:g} s") from error
        finally:
            del self._answers[nonce]

    async def ready(self) -> Ready:
        """Wait for the engine to have loaded its model; raises ModelError with what it says when it cannot.

        Raises EngineDeadError when it ended without a word.
        """
        ready = await asyncio.shield(self._ready)
        while self.dead is None and not self._outbox.poll(0, zmq.POLLOUT):
            await asyncio.sleep(0.01)
        return ready

    def send(self, message: ToEngine) -> None:
        """Tell the engine something that it does not answer; lost when the engine is gone."""
        if self.dead is None:
            with contextlib.suppress(EngineDeadError):
                self._send(message)

    def fail(self, message: str = ENGINE_DIED) -> None:
        """Everyone who waits gets EngineDeadError, now and from here on."""
        if self.dead is not None:
            return
        self.dead = EngineDeadError(message)
        for submission in {live.submission for live in self._live.values()}:
            submission.fail(self.dead, "error")
        for waiter in (self._ready, *self._answers.values()):
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

    def _end(self, live: Live, finish: str, now: float) -> None:
        """Forget a request."""
        if live.first is None:
            self.queue.leave(live.prompt_tokens)
        self.metrics.on_end(live, finish, now)
        self.queue.end()
        del self._live[live.id]
        if not self._live:
            self._idle.set()

    async def _receive(self) -> None:
        try:
            while True:
                self._dispatch(self._decoder.decode(await self._inbox.recv()))
        except Exception:
            logger.exception("what the engine sends cannot be read")
            self.fail()

    def _dispatch(self, message: FromEngine) -> None:
        match message:
            case Events():
                self._on_events(message, time.monotonic())
            case Pong(nonce) | Flushed(nonce):
                answer = self._answers.get(nonce)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Failed(error):
                self._on_failed(error)

    def _on_events(self, message: Events, now: float) -> None:
        """Count what a step did, and hand it to those who wait for it."""
        lives, metrics = self._live, self.metrics
        for request_id in message.admitted:
            if (live := lives.get(request_id)) is not None:
                metrics.on_admitted(live, now)
        for event in message.events:
            if (live := lives.get(event.id)) is None:
                continue
            if event.tokens:
                if live.first is None:
                    self.queue.leave(live.prompt_tokens, now - live.arrived)
                    live.cached_tokens = event.cached_tokens
                metrics.on_tokens(live, len(event.tokens), now)
            live.submission.put(event)
            if event.finish is not None:
                self._end(live, event.finish.value, now)

    def _on_failed(self, error: str) -> None:
        if self._ready.done():
            logger.error("the engine failed: %s", error)
        else:
            self._ready.set_exception(ModelError(error))
        self.fail()
