"""The engine as the HTTP side sees it: the requests that are live, the limits of its queue, and a link to it."""

import abc
import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Self

import msgspec

from minisgl.config import Config
from minisgl.core.types import EngineStats, FinishReason, Request, TokenEvent
from minisgl.errors import EngineDeadError, MinisglError, ModelError
from minisgl.server import errors, ipc
from minisgl.server.metrics import ACCESS_RECORD, Metrics, RequestStats

ENGINE_DIED = "the engine ended; nothing can be generated until the server is started again"
MAX_LIVE = 4096  # that wait or run; more are turned away rather than queued without bound
MAX_RETRY_SECONDS = 60
DRAIN_POLL_SECONDS = 0.05
CONNECT_SECONDS = 0.02  # between two attempts to reach an engine that does not listen yet

logger = logging.getLogger(__name__)


class Queue:
    """Requests in the engine that have no token yet, and the tokens of their prompts, within `config`'s limits."""

    def __init__(self, config: Config, metrics: Metrics, max_live: int = MAX_LIVE) -> None:
        self.max_requests = math.inf if config.max_queued_requests is None else config.max_queued_requests
        self.max_tokens = math.inf if config.max_queued_tokens is None else config.max_queued_tokens
        self.max_live = max_live  # requests that wait or run
        self.metrics = metrics
        self.requests = self.tokens = 0
        self.wait = 0.0  # s, running mean of the time to the first token: what clients turned away are told to wait

    def check(self, requests: Sequence[Request], live: int) -> None:
        """Raise OverloadedError or QueueFullError unless these may enter beside `live` others."""
        retry_after = max(1, min(MAX_RETRY_SECONDS, math.ceil(self.wait)))
        count, tokens = len(requests), sum(len(request.prompt) for request in requests)
        if live + count > self.max_live:
            raise errors.OverloadedError(f"{live} requests are live already; try again later", retry_after)
        # An empty queue takes whatever the server can keep: otherwise the request could never be served.
        if self.requests and (self.requests + count > self.max_requests or self.tokens + tokens > self.max_tokens):
            waiting = f"{self.requests} requests with {self.tokens} prompt tokens are waiting already"
            raise errors.QueueFullError(f"{waiting}; try again later", retry_after)

    def change(self, requests: int, tokens: int, waited: float | None = None) -> None:
        if waited is not None:
            self.wait += (waited - self.wait) / 8
        self.requests += requests
        self.tokens += tokens
        self.metrics.queued_requests.set(self.requests)
        self.metrics.queued_tokens.set(self.tokens)


class RequestGroup:
    """Requests in the engine that answer one HTTP request. Leaving the `with` block aborts what is still live."""

    def __init__(self, client: "EngineClient", requests: Sequence[Request], timeout: float | None = None) -> None:
        self._client = client
        self._live = {request.id for request in requests}
        self._batch: list[TokenEvent] = []
        self._wake = asyncio.Event()
        self._error: MinisglError | None = None
        self._timer: asyncio.TimerHandle | None = None
        if timeout is not None:
            error = errors.RequestTimeoutError(f"the request took longer than the {timeout:g} s this server allows")
            self._timer = asyncio.get_running_loop().call_later(timeout, self.fail, error, "timeout")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._release(self._live, "abort")
        if self._timer is not None:
            self._timer.cancel()

    def put(self, event: TokenEvent) -> None:
        self._batch.append(event)
        if event.finish is not None:
            self._live.discard(event.id)
        self._wake.set()

    def fail(self, error: MinisglError, finish: str) -> None:
        """End everything that is live; the reader gets `error` after what has come already."""
        if self._error is None and self._live:
            self._error = error
            self._release(self._live, finish)
            self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request in the engine, its completion being done; no event of it comes any more."""
        self._release({request_id}, "stop")
        self._batch = [event for event in self._batch if event.id != request_id]
        self._wake.set()

    def _release(self, ids: set[str], finish: str) -> None:
        live = self._live & ids
        self._live -= live
        if live:
            self._client.release(sorted(live), finish)

    async def batches(self) -> AsyncIterator[ipc.Events]:
        """What has come since the last batch, until every request has ended; raises the error that ended them first."""
        while True:
            if self._batch:
                batch, self._batch = ipc.Events(self._batch), []
                yield batch
            elif self._error is not None:
                raise self._error
            elif self._live:
                self._wake.clear()
                await self._wake.wait()
            else:
                return


class EngineClient(abc.ABC):
    """The requests that are live, and whether the engine is. Belongs to one event loop. No queue is without bound."""

    def __init__(self, config: Config, metrics: Metrics | None, max_live: int) -> None:
        self.dead: EngineDeadError | None = None  # why the engine is `gone`
        self.gone = asyncio.Event()
        self.draining = False
        self.metrics = metrics or Metrics(prefix=config.metrics_prefix)
        self.queue = Queue(config, self.metrics, max_live)
        self.stats = EngineStats()  # when the engine last replied
        self._timeout = config.request_timeout
        self._live: dict[str, tuple[RequestStats, RequestGroup]] = {}

    @abc.abstractmethod
    def _send(self, message: ipc.ToEngine) -> None:
        """Send without waiting, to an engine that is ready."""

    @abc.abstractmethod
    async def query(self, action: ipc.Action, timeout: float, argument: str | int | None = None) -> ipc.Reply:
        """Have an `ipc.Query` answered. Raises EngineDeadError as `ping` does."""

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(self, requests: Sequence[Request]) -> RequestGroup:
        """Give requests to the engine, all or none. Raises EngineDeadError, DrainingError, and as `check` does."""
        if self.dead is not None:
            raise self.dead
        try:
            if self.draining:
                raise errors.DrainingError("the server is shutting down")
            self.queue.check(requests, len(self._live))
        except errors.RetryLaterError as error:
            self.metrics.rejected.labels(str(error.code)).inc()
            raise
        for request in requests:
            self._send(ipc.Add(request))  # first of all, so that the engine begins; its events come later
        record = ACCESS_RECORD.get()
        arrived = time.monotonic() if record is None else record.started
        group = RequestGroup(self, requests, self._timeout)
        for request in requests:
            stats = RequestStats(len(request.prompt), arrived)
            self._live[request.id] = stats, group
            self.queue.change(1, stats.prompt_tokens)
            if record is not None:
                record.choices.append(stats)
        return group

    def release(self, ids: list[str], finish: str) -> None:
        """Forget these requests and have the engine end them; `finish` is why, for the metrics."""
        for request_id in ids:
            self._end(request_id, finish, time.monotonic())
        if self.dead is None:
            self._send(ipc.Abort(ids))

    async def drain(self) -> None:
        self.draining = True
        while self._live:
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def ping(self, timeout: float) -> EngineStats:
        """The engine's counts, from between two steps; raises EngineDeadError when they do not come in time (s)."""
        return (await self.query("stats", timeout)).stats

    def fail(self, message: str = ENGINE_DIED) -> None:
        """Everyone who waits gets EngineDeadError, now and from here on."""
        if self.dead is not None:
            return
        self.dead = EngineDeadError(message)
        self.gone.set()
        for group in {group for _, group in self._live.values()}:
            group.fail(self.dead, "error")

    def _end(self, request_id: str, finish: str, now: float) -> None:
        request, _ = self._live.pop(request_id)
        if request.first is None:
            self.queue.change(-1, -request.prompt_tokens)
        self.metrics.on_end(request, finish, now)

    def _on_events(self, message: ipc.Events, now: float) -> None:
        live, metrics = self._live, self.metrics
        for event in message.events:
            if (found := live.get(event.id)) is None:
                continue
            request, group = found
            if event.finish is FinishReason.ABORT:  # what this process aborts is not live here any more
                group.fail(errors.RequestAbortedError("the operator ended this request"), "abort")
                continue
            if event.tokens:
                if request.first is None:
                    self.queue.change(-1, -request.prompt_tokens, now - request.arrived)
                    request.cached_tokens = event.cached_tokens
                metrics.on_tokens(request, len(event.tokens), now)
            elif event.finish is None:
                request.admitted = request.admitted or now
            group.put(event)
            if event.finish is not None:
                self._end(event.id, event.finish.value, now)


class SocketEngineClient(EngineClient, asyncio.Protocol):
    """A link to the engine. It waits until the engine's process listens, so either may be first."""

    def __init__(self, folder: str, config: Config, metrics: Metrics | None = None, max_live: int = MAX_LIVE) -> None:
        super().__init__(config, metrics, max_live)
        self._replies: dict[int, asyncio.Future[ipc.Reply]] = {}
        self._nonces = itertools.count(1)
        self._ready: asyncio.Future[ipc.Ready] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None
        self._unread = bytearray()  # the beginning of a message
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ipc.FromEngine)
        self._connecting = asyncio.create_task(self._connect(ipc.address(folder)))

    async def query(self, action: ipc.Action, timeout: float, argument: str | int | None = None) -> ipc.Reply:
        if self.dead is not None:
            raise self.dead
        nonce = next(self._nonces)
        waiter: asyncio.Future[ipc.Reply] = asyncio.get_running_loop().create_future()
        self._replies[nonce] = waiter
        try:
            self._send(ipc.Query(nonce, action, argument))
            async with asyncio.timeout(timeout):
                reply = await waiter
        except TimeoutError as error:
            raise EngineDeadError(f"the engine did not answer within {timeout:g} s") from error
        finally:
            del self._replies[nonce]
        self.stats = reply.stats
        return reply

    async def ready(self) -> ipc.Ready:
        """Wait for the model to be loaded. Raises ModelError when it cannot be, EngineDeadError if the engine ended."""
        return await asyncio.shield(self._ready)

    def fail(self, message: str = ENGINE_DIED) -> None:
        super().fail(message)
        waiters: list[asyncio.Future[Any]] = [self._ready, *self._replies.values()]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(EngineDeadError(message))

    async def close(self) -> None:
        self.fail("the server is shutting down")
        self._connecting.cancel()
        await asyncio.gather(self._connecting, return_exceptions=True)
        self._ready.exception()  # retrieved, or asyncio warns
        if self._transport is not None:
            self._transport.abort()

    def _send(self, message: ipc.ToEngine) -> None:
        assert self._transport is not None
        self._transport.write(ipc.frame(self._encoder.encode(message)))  # never waits, whatever its size

    async def _connect(self, path: str) -> None:
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                await asyncio.get_running_loop().create_unix_connection(lambda: self, path)
                return
            await asyncio.sleep(CONNECT_SECONDS)

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.fail()  # the engine is gone; what it sent before was read

    def data_received(self, data: bytes) -> None:
        self._unread += data
        for encoded in ipc.cut(self._unread):
            match message := self._decoder.decode(encoded):
                case ipc.Events():
                    self._on_events(message, time.monotonic())
                case ipc.Reply(nonce):
                    waiter = self._replies.get(nonce)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(message)
                case ipc.Ready():
                    if not self._ready.done():
                        self._ready.set_result(message)
                case ipc.Failed(error):
                    if self._ready.done():
                        logger.error("the engine failed: %s", error)
                    else:
                        self._ready.set_exception(ModelError(error))
                    self.fail()


@dataclasses.dataclass(frozen=True)
class Shutdown:
    # `stop` lets a server finish what it has, `force` does not.
    stop: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    force: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


async def wait_first(*waits: Awaitable[Any], timeout: float | None = None) -> None:
    """Return when one of these is done, or after `timeout` s. Coroutines are cancelled then, the rest goes on."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()
