"""What Ray Serve runs: replicas of the engine, and before them the server's own HTTP application.

Of Ray only public interfaces are used; those of the request router are alpha. They were tested with Ray 2.60.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Gauge
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisgl.config import Config
from minisgl.core.types import EngineStats, Request
from minisgl.errors import EngineDeadError, MinisglError
from minisgl.formats.hub import locate_model
from minisgl.prefix_routing import PrefixRouter
from minisgl.server import ipc
from minisgl.server.api_process import build_app, with_middleware
from minisgl.server.engine_client import EngineClient, SocketEngineClient
from minisgl.server.errors import OverloadedError, error_response
from minisgl.server.launch import ENGINE_COMMAND, describe_status, start_process, watch_engine
from minisgl.server.metrics import share
from minisgl.system import PrivateFolder

REPORT_SECONDS: Final = 1.0
PING_TIMEOUT: Final = 10.0  # s; a step with prompts takes seconds on a CPU
LAST_ERRORS_SECONDS: Final = 0.5  # for the errors of its requests to leave a replica whose engine has ended
LEASE_SECONDS: Final = 30.0  # of an ingress, which renews it; without that its requests end
RENEW_SECONDS: Final = 5.0
# Before a request that has no token yet is tried once more, s: a replica that dies is gone after some of them.
RETRY_DELAYS: Final = (0.5, 1.0, 2.0)

logger = logging.getLogger(__name__)


class ManyIngressesError(MinisglError, status=501, code="unsupported_endpoint"): ...


class EngineReplica:
    """One engine, in a process of its own as in `serve`. When the engine ends, so does the replica."""

    client: SocketEngineClient
    ready: ipc.Ready

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        ipc.start_logging(config, "replica ")
        self.folder = PrivateFolder()
        process = await start_process(ENGINE_COMMAND, ipc.EngineSetup(config, self.folder.name))
        self.client = SocketEngineClient(self.folder.name, config)
        self.watching = asyncio.create_task(watch_engine(process, self.client))
        try:
            self.ready = await self.client.ready()
        except EngineDeadError:
            status = describe_status(await self.watching)
            raise EngineDeadError(f"the engine process ended with {status} before it was ready") from None
        self.watching.add_done_callback(
            lambda _: asyncio.get_running_loop().call_later(LAST_ERRORS_SECONDS, os._exit, 1)
        )
        self.renewed: dict[str, float] = {}  # when each ingress was last heard of
        self.reporting = asyncio.create_task(self.report())

    async def describe(self) -> ipc.Ready:
        return self.ready

    async def generate(self, request: Request, ingress: str) -> AsyncGenerator[bytes | MinisglError, None]:
        """What the engine does for one request, `ipc.Events` in bytes or an error; closing this aborts it."""
        self.renewed[ingress] = time.monotonic()
        try:
            with self.client.submit([request]) as group:
                async for batch in group.batches():
                    if time.monotonic() > self.renewed[ingress] + LEASE_SECONDS:  # it died: Serve cancels nothing
                        return
                    yield msgspec.msgpack.encode(batch)
        except MinisglError as error:
            yield error

    async def renew(self, ingress: str) -> None:
        if ingress in self.renewed:
            self.renewed[ingress] = time.monotonic()

    async def query(self, action: ipc.Action, timeout: float, argument: str | int | None) -> ipc.Reply:
        return await self.client.query(action, timeout, argument)

    async def check_health(self) -> None:
        await self.client.ping(PING_TIMEOUT)

    def record_autoscaling_stats(self) -> dict[str, float]:
        stats = self.client.stats
        return {"waiting": float(stats.waiting), "kv_use": share(stats.pages_held, stats.pages_total)}

    async def report(self) -> None:
        """Keep Ray's gauges up to date. Ray adds the names of the deployment and of the replica."""
        running = Gauge("minisgl_num_requests_running", description="requests that decode or prefill")
        waiting = Gauge("minisgl_num_requests_waiting", description="requests that wait for a place")
        held = Gauge("minisgl_kv_cache_held_perc", description="share of the KV pages that requests use")
        while True:
            try:
                stats = await self.client.ping(PING_TIMEOUT)
            except EngineDeadError:
                logger.warning("the engine did not answer within %g s", PING_TIMEOUT)
            else:
                running.set(stats.running)
                waiting.set(stats.waiting)
                held.set(share(stats.pages_held, stats.pages_total))
            await asyncio.sleep(REPORT_SECONDS)


class ReplicaClient(EngineClient):
    """All replicas as one engine. Each request is a stream from the replica that Serve's router chooses for it."""

    def __init__(self, replicas: DeploymentHandle[Any], config: Config, max_live: int) -> None:
        super().__init__(config, None, max_live)
        self._replicas = replicas
        self._generate = replicas.options(method_name="generate", stream=True)
        self._name = uuid.uuid4().hex
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(TimeoutError, RayError, RayServeException):  # of a replica that ends
                await self._replicas.broadcast("renew", self._name).results_async(timeout_s=RENEW_SECONDS)

    def _send(self, message: ipc.ToEngine) -> None:
        match message:
            case ipc.Add(request):
                # In an empty context: calls in that of an HTTP request share an id, and Serve's router mixes them up.
                task = asyncio.create_task(self._run(request), context=Context())
                self._streams[request.id] = task
                task.add_done_callback(lambda _: self._streams.pop(request.id, None))
            case ipc.Abort(ids):
                for stream in [self._streams[request_id] for request_id in ids if request_id in self._streams]:
                    stream.cancel()

    async def _run(self, request: Request) -> None:
        """Have one request answered; one whose replica is lost before its first token goes to another."""
        for delay in (*RETRY_DELAYS, None):
            error = await self._stream(request)
            if (live := self._live.get(request.id)) is None:
                return
            stats, group = live
            if not isinstance(error, EngineDeadError) or stats.first is not None or delay is None:
                break
            logger.warning("request %s lost its replica before its first token; it is tried again", request.id)
            await asyncio.sleep(delay)
        group.fail(error or EngineDeadError("the stream of a replica ended early"), "error")

    async def _stream(self, request: Request) -> MinisglError | None:
        """Take in what a replica does for a request; what it ended with, if not with its last token."""
        response = self._generate.remote(request, self._name)
        try:
            async for said in response:
                if isinstance(said, MinisglError):
                    return said
                self._on_events(msgspec.msgpack.decode(said, type=ipc.Events), time.monotonic())
        except BackPressureError:
            return OverloadedError("all replicas are busy; try again later")
        except (RayActorError, RayServeException):
            return EngineDeadError("the replica that generated this ended")
        finally:
            response.cancel()
        return None

    async def query(self, action: ipc.Action, timeout: float, argument: str | int | None = None) -> ipc.Reply:
        """The replies of all replicas as one, whose counts are sums. Raises EngineDeadError when one does not reply."""
        responses = self._replicas.broadcast("query", action, timeout, argument)
        try:
            replies = await responses.results_async(timeout_s=timeout)
        except TimeoutError as error:
            raise EngineDeadError(f"a replica did not answer within {timeout:g} s") from error
        except (RayError, RayServeException, EngineDeadError) as error:
            raise EngineDeadError("a replica does not answer") from error
        if not replies:
            raise EngineDeadError("no replica runs")
        total: Counter[str] = Counter()
        for reply in replies:
            total.update(msgspec.structs.asdict(reply.stats))
        self.stats = EngineStats(**total)
        return ipc.Reply(0, self.stats, sum(reply.count for reply in replies))


@serve.ingress()
class Ingress:
    """The server's HTTP application; it tokenises, and has the replicas generate."""

    async def __init__(self, replicas: DeploymentHandle[Any], config: Config, max_live: int) -> None:  # type: ignore[misc]
        ipc.start_logging(config, "ingress ")
        ready: ipc.Ready = await replicas.options(method_name="describe").remote()
        if not Path(ready.folder).is_dir():  # the replica is on another host
            folder = locate_model(config.model, config.model_source, weights=False)
            ready = msgspec.structs.replace(ready, folder=str(folder))
        # The limits of the queue are each replica's.
        own = config.replace(max_queued_requests=None, max_queued_tokens=None)
        client = ReplicaClient(replicas, own, max_live)
        self.application, _ = build_app(config, client, ready, time.monotonic())
        self.http = with_middleware(self.application, client.metrics, config)
        self.alone = config.api_workers == 1

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def serve_asgi(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":  # its start and end, which the middleware does not know
                await self.application(scope, receive, send)
            elif scope["path"] == "/metrics" and not self.alone:
                reason = "each ingress counts for itself, and Ray Serve reaches any; read Ray's metrics"
                await error_response(ManyIngressesError(reason))(scope, receive, send)
            else:
                await self.http(scope, receive, partial(send_without_id, send))

        return serve_asgi


async def send_without_id(send: Send, message: Message) -> None:
    """Send of a response what Serve's proxy does not write itself: it gives each request the same id."""
    if message["type"] == "http.response.start":
        headers = [header for header in message["headers"] if header[0] != b"x-request-id"]
        message = {**message, "headers": headers}
    await send(message)


class PrefixRequestRouter(RequestRouter):
    def initialize_state(self, **kwargs: Any) -> None:
        self.prefixes = PrefixRouter(**kwargs)
        self.places: dict[str, ReplicaID] = {}  # of the requests that this router has on their way or at a replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica for this request, and the others in case that it takes no more."""
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if pending_request is None or not isinstance(request, Request) or not candidate_replicas:
            return [candidate_replicas]
        counts = Counter(self.places.values())
        loads = {each.replica_id: counts[each.replica_id] for each in candidate_replicas}
        chosen = self.prefixes.choose(request.prompt_bytes, loads)
        place = pending_request.metadata.internal_request_id
        self.places[place] = chosen
        pending_request.future.add_done_callback(lambda routed: routed.cancelled() and self.places.pop(place, None))
        first = [each for each in candidate_replicas if each.replica_id == chosen]
        return [first, [each for each in candidate_replicas if each.replica_id != chosen]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if (place := pending_request.metadata.internal_request_id) in self.places:
            self.places[place] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.places.pop(internal_request_id, None)
