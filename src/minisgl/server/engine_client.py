"""The engine as the HTTP side sees it: its process, an asyncio bridge over two sockets, and the limits of its queue."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import shutil
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from minisgl.config import Config
from minisgl.errors import EngineDeadError, InvalidRequestError, MinisglError, ModelError
from minisgl.server.errors import (
    DrainingError,
    OverloadedError,
    QueueFullError,
    RequestAbortedError,
    RequestTimeoutError,
    RetryLaterError,
)
from minisgl.server.metrics import ACCESS_RECORD, Metrics, RequestStats
from minisgl.server.process_messages import (
    LAUNCHER,
    Abort,
    AbortedElsewhere,
    AbortElsewhere,
    Add,
    CacheFlushed,
    EngineSetup,
    Events,
    Failed,
    FlushCache,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Revoked,
    ToEngine,
    belongs_to,
)
from minisgl.types import EngineStats, Request, TokenEvent

ENGINE_COMMAND = (sys.executable, "-m", "minisgl.server.engine_process")
ENGINE_DIED = "the engine ended; nothing can be generated until the server is started again"
MAX_LIVE_REQUESTS = 4096
"""Requests that wait or run at a time; more are turned away rather than queued without bound."""
MAX_RETRY_SECONDS = 60
DRAIN_RETRY_SECONDS = 5
"""When a client that is turned away by a server going down is told to try again: another one may answer then."""
LAST_WORDS_SECONDS = 0.3
"""How long the last messages of a process that has ended are waited for."""
STOP_SECONDS = 2.0
"""How long a process gets to go by itself, and then after SIGTERM."""
MAX_SOCKET_FOLDER = 80
"""Characters; the path of a Unix socket has at most 107."""

T = TypeVar("T", Pong, CacheFlushed, AbortedElsewhere)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """`live` requests at most; the rest is what `Config` says under the same names, None for no limit."""

    live: int = MAX_LIVE_REQUESTS
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    request_timeout: float | None = None

    @classmethod
    def of(cls, config: Config) -> Limits:
        return cls(
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            request_timeout=config.request_timeout,
        )


class Queue:
    """Requests in the engine that have no token yet, and the tokens of their prompts; `live` are all that live.

    `wait` is a running mean of the time to the first token, in s: what a client that is turned away is told to wait.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self.requests = 0
        self.tokens = 0
        self.live = 0
        self.wait = 0.0

    def check(self, requests: Sequence[Request]) -> None:
        """Raise InvalidRequestError, OverloadedError or QueueFullError unless these may enter beside those that live.

        An empty queue takes whatever the server can keep: otherwise the request could never be served.
        """
        limits = self.limits
        if len(requests) > limits.live:
            raise InvalidRequestError(f"at most {limits.live} prompts fit in one request", param="prompt")
        if self.live + len(requests) > limits.live:
            raise OverloadedError(f"{self.live} requests are live already; try again later", self.retry_after)
        if not self.requests:
            return
        if limits.max_queued_requests is not None and self.requests + len(requests) > limits.max_queued_requests:
            raise QueueFullError(f"{self.requests} requests are waiting already; try again later", self.retry_after)
        tokens = self.tokens + sum(len(request.prompt) for request in requests)
        if limits.max_queued_tokens is not None and tokens > limits.max_queued_tokens:
            raise QueueFullError(
                f"prompts of {self.tokens} tokens are waiting already; try again later", self.retry_after
            )

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room."""
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(self.wait)))

    def enter(self, tokens: int) -> None:
        """A request with so many prompt tokens lives, and waits."""
        self.live += 1
        self._change(1, tokens)

    def leave(self, tokens: int, waited: float | None = None) -> None:
        """It waits no more: it has its first token after `waited` s, or has ended without one."""
        if waited is not None:
            self.wait += (waited - self.wait) / 8
        self._change(-1, -tokens)

    def _change(self, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens
        self.metrics.queued_requests.set(self.requests)
        self.metrics.queued_tokens.set(self.tokens)


class RequestGroup:
    """Requests in the engine that answer one HTTP request. Leaving the `with` block aborts what is still live.

    After `timeout` s, if one is given, the requests end and the reader gets RequestTimeoutError.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request], timeout: float | None = None) -> None:
        self._client = client
        self._live = {request.id for request in requests}
        self._events: list[TokenEvent] = []
        self._wake = asyncio.Event()
        self._error: MinisglError | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            error = RequestTimeoutError(f"the request took longer than the {timeout:g} s this server allows")
            self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, error, "timeout")

    def __enter__(self) -> RequestGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release(self._live, "abort")
        if self._timer is not None:
            self._timer.cancel()

    def put(self, event: TokenEvent) -> None:
        """Take in an event; called by the client."""
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
        """End these requests in the engine, their completions being done; no event of them comes any more."""
        ids = set(ids)
        self._release(ids, "stop")
        self._events = [event for event in self._events if event.id not in ids]
        self._wake.set()

    def _release(self, ids: set[str], finish: str) -> None:
        live = self._live & ids
        self._live -= live
        if live:
            self._client.release(sorted(live), finish)

    async def batches(self) -> AsyncIterator[list[TokenEvent]]:
        """Whatever has come since the last call, until every request has ended or was aborted.

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


class EngineClient:
    """Both sockets, the requests that are live, and whether the engine is. Belongs to one event loop.

    It binds the sockets and the engine's process connects, so either may be first. No queue here is without bound:
    `queue` says how many requests may be live, and none has more than its `max_tokens` tokens waiting. `link` is the
    number that the engine knows this process by.
    """

    def __init__(
        self,
        to_engine: str,
        from_engine: str,
        limits: Limits | None = None,
        link: int = LAUNCHER,
        metrics: Metrics | None = None,
    ) -> None:
        self.dead: EngineDeadError | None = None
        self.draining = False
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self.queue = Queue(self.limits, self.metrics)
        self.link = link
        self.stats = EngineStats()
        """The engine's counts when it last answered."""
        self._live: dict[str, tuple[RequestStats, RequestGroup]] = {}
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

    def submit(self, requests: Sequence[Request]) -> RequestGroup:
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
            self.metrics.rejected.labels(str(error.code)).inc()
            raise
        record = ACCESS_RECORD.get()
        arrived = time.monotonic() if record is None else record.started
        group = RequestGroup(self, requests, self.limits.request_timeout)
        for request in requests:
            stats = RequestStats(request, arrived)
            self._live[request.id] = stats, group
            self.queue.enter(stats.prompt_tokens)
            if record is not None:
                record.choices.append(stats)
        self._idle.clear()
        try:
            for request in requests:
                self._send(Add(request, self.link))
        except EngineDeadError as error:
            group.fail(error, "error")
            raise
        return group

    def release(self, ids: list[str], finish: str) -> None:
        """Forget these requests and have the engine end them; `finish` is why, for the metrics."""
        now = time.monotonic()
        for request_id in ids:
            if request_id in self._live:
                self._end(request_id, finish, now)
        if ids:
            self.send(Abort(ids))

    async def abort(self, answer_id: str | None, timeout: float) -> int:
        """End the requests of the answer with this id, or all (None), in every API process; how many those were."""
        count = self._abort([request_id for request_id in self._live if belongs_to(request_id, answer_id)])
        if self.link == LAUNCHER:
            return count
        return count + (await self._ask(AbortElsewhere, AbortedElsewhere, timeout, answer_id)).count

    def _abort(self, ids: Iterable[str]) -> int:
        found = [self._live[request_id][1] for request_id in ids if request_id in self._live]
        error = RequestAbortedError("the operator ended this request")
        for group in set(found):
            group.fail(error, "abort")
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
        return (await self._ask(FlushCache, CacheFlushed, timeout)).pages

    async def _ask(self, question: Callable[..., ToEngine], kind: type[T], timeout: float, *more: object) -> T:
        if self.dead is not None:
            raise self.dead
        nonce = next(self._nonces)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._answers[nonce] = answer
        try:
            self._send(question(nonce, self.link, *more))
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
        for group in {group for _, group in self._live.values()}:
            group.fail(self.dead, "error")
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

    def _end(self, request_id: str, finish: str, now: float) -> None:
        """Forget a request."""
        request, _ = self._live.pop(request_id)
        self.queue.live -= 1
        if request.first is None:
            self.queue.leave(request.prompt_tokens)
        self.metrics.on_end(request, finish, now)
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
            case Pong(nonce) | CacheFlushed(nonce) | AbortedElsewhere(nonce):
                answer = self._answers.get(nonce)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Revoked(ids):
                self._abort(ids)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case Failed(error):
                if self._ready.done():
                    logger.error("the engine failed: %s", error)
                else:
                    self._ready.set_exception(ModelError(error))
                self.fail()

    def _on_events(self, message: Events, now: float) -> None:
        """Count what a step did, and hand it to those who wait for it."""
        live, metrics = self._live, self.metrics
        for request_id in message.admitted:
            if request_id in live:
                metrics.on_admitted(live[request_id][0], now)
        for event in message.events:
            if (found := live.get(event.id)) is None:
                continue
            request, group = found
            if event.tokens:
                if request.first is None:
                    self.queue.leave(request.prompt_tokens, now - request.arrived)
                    request.cached_tokens = event.cached_tokens
                metrics.on_tokens(request, len(event.tokens), now)
            group.put(event)
            if event.finish is not None:
                self._end(event.id, event.finish.value, now)


class EngineProcess:
    """A running engine process and the client of it. Make one with `start`, end it with `stop`.

    `folder` has the sockets; only this user can enter it. `ended` is done, with the exit status, when the process has
    ended and everyone who waited knows.
    """

    def __init__(self, process: Process, client: EngineClient, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self._process = process
        self.ended = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, config: Config, command: Sequence[str] = ENGINE_COMMAND) -> EngineProcess:
        """Start the process. It has its own session, so that Ctrl-C in the terminal reaches the parent alone."""
        folder = socket_folder()
        to_engine, from_engine = f"ipc://{folder}/to_engine", f"ipc://{folder}/from_engine"
        client = EngineClient(to_engine, from_engine, Limits.of(config))
        try:
            process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, start_new_session=True)
            assert process.stdin is not None
            setup = EngineSetup(config.replace(api_key=()), to_engine, from_engine)
            process.stdin.write(msgspec.json.encode(setup) + b"\n")
        except BaseException:
            await client.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(process, client, folder)

    async def ready(self, waiting: Callable[[float], None], every: float = 5.0) -> Ready:
        """Wait until it serves; `waiting` is told every so often (s) for how long (s) that has taken.

        Raises ModelError with what the engine says when it cannot start, EngineDeadError when it just ends.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        ready = asyncio.ensure_future(self.client.ready())
        try:
            while not ready.done():
                await asyncio.wait((ready,), timeout=every)
                if not ready.done():
                    waiting(loop.time() - started)
            return ready.result()
        except EngineDeadError as error:
            status = describe_status(await self.stop())
            raise EngineDeadError(f"the engine process ended with {status} before it was ready") from error
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
        await self.client.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return status

    async def _watch(self) -> int:
        status = await self._process.wait()
        await asyncio.sleep(LAST_WORDS_SECONDS)
        self.client.fail()
        return status


def describe_status(status: int) -> str:
    """An exit status in words."""
    return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def socket_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for sockets."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="minisgl-", dir=folder if len(folder) <= MAX_SOCKET_FOLDER else "/tmp"))
