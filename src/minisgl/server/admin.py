"""The operator's endpoints: whether the server works, what it runs with, what it counts, and two levers."""

import asyncio
import contextlib
import dataclasses
import datetime
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from minisgl import __version__
from minisgl.core.types import EngineStats, SamplingParams, StepRecord
from minisgl.core.types import Request as EngineRequest
from minisgl.errors import EngineDeadError, InvalidRequestError
from minisgl.server import responses
from minisgl.server.errors import ApiProcessError, DrainingError, OverloadedError, QueueFullError
from minisgl.server.metrics import CONTENT_TYPE, MetricsPage
from minisgl.server.openapi import ApiRoute
from minisgl.server.preparation import Api
from minisgl.server.protocol import AbortOrder
from minisgl.server.responses import json_response

SCRAPE_TIMEOUT = 1.0  # s that /metrics waits for the engine's counts; in a longer step those it gave last are shown
BODY_LIMIT = 4096
HEALTH_POLL, STEPS_POLL = 0.02, 0.05  # s


def admin_routes(api: Api) -> list[ApiRoute]:
    client, model, preparation = api.client, api.preparation.model, api.preparation
    load_rate, scrape_rate = Throughput(api.started), Throughput(api.started)

    async def health(_: Request) -> Response:
        """200 when the engine and all API processes answer in time, else 503."""
        stats = await client.ping(api.health_timeout)
        if silent := client.metrics.num_silent():
            raise ApiProcessError(f"{silent} of the API processes do not answer")
        return json_response(responses.Health(running=stats.running, waiting=stats.waiting))

    async def health_generate(request: Request) -> Response:
        """200 when the engine generates a token in time, for this request or for another that it is busy with."""
        answer, before = await health(request), client.stats.generated_tokens
        params = SamplingParams(temperature=0, max_tokens=1)
        probe = EngineRequest.make(id=f"health-{uuid.uuid4().hex}-0", prompt=[0], params=params)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(QueueFullError, OverloadedError):
                stack.enter_context(client.submit([probe]))
            deadline = time.monotonic() + api.health_timeout
            while time.monotonic() < deadline:
                if (await client.ping(api.health_timeout)).generated_tokens != before:
                    return answer
                await asyncio.sleep(HEALTH_POLL)
        raise EngineDeadError(f"the engine generated nothing within {api.health_timeout:g} s")

    async def ready(_: Request) -> Response:
        """200 when new requests are taken, 503 when the server is going down or the engine is gone."""
        if client.dead is not None:
            raise client.dead
        if client.draining:
            raise DrainingError("the server is shutting down")
        return json_response(responses.IsReady())

    async def version(_: Request) -> Response:
        """The version of this program."""
        return json_response(responses.Version(__version__))

    async def server_info(_: Request) -> Response:
        """Configuration without secrets, the engine's choices and counts, this process' queue, uptime (s)."""
        stats = await client.ping(api.health_timeout)
        config = {**dataclasses.asdict(api.config), "api_key": f"{len(api.config.api_key)} set"}
        queued, uptime = responses.Queued(client.queue.requests, client.queue.tokens), time.monotonic() - api.started
        info = responses.ServerInfo(
            __version__, config, api.notes, stats, queued, client.draining, round(uptime, 3), model_path=api.folder,
            served_model_name=preparation.names[0], tp_size=api.config.tp, context_length=model.max_seq_len,
            max_total_num_tokens=stats.pages_total * api.config.page_size, max_running_requests=stats.max_running,
        )  # fmt: skip
        return json_response(info)

    async def loads(_: Request) -> Response:
        """How busy the engine is, under SGLang's names."""
        stats = await client.ping(api.health_timeout)
        rate = load_rate.since_last(stats.generated_tokens)
        return json_response(describe_loads(stats, api.config.page_size, rate))

    async def load(_: Request) -> Response:
        """The requests that wait or run."""
        stats = await client.ping(api.health_timeout)
        return json_response(responses.ServerLoad(stats.running + stats.waiting))

    async def model_info(_: Request) -> Response:
        """The model: its names, where its files are, and what it can take."""
        names, eos, size, length = preparation.names, model.eos_token_ids, model.vocab_size, model.max_seq_len
        chats = preparation.tokenizer.chat_template is not None
        return json_response(responses.ModelFacts(names[0], names, api.folder, size, length, eos, chats, api.folder))

    async def metrics(_: Request) -> Response:
        """Prometheus' page. It never fails: without the engine it has the engine's last counts."""
        with contextlib.suppress(EngineDeadError):
            await client.ping(SCRAPE_TIMEOUT)
        rate, size = scrape_rate.since_last(client.stats.generated_tokens), api.config.page_size
        page = MetricsPage(client.metrics, client.stats, client.dead is None, preparation.names[0], size, rate)
        return Response(generate_latest(page), media_type=CONTENT_TYPE)

    async def flush_cache(request: Request) -> Response:
        """Drop every cached page that no request uses."""
        api.check_sender(request, same_origin=True)
        return json_response(responses.FlushReport((await client.query("flush_cache", api.health_timeout)).count))

    async def abort_request(request: Request) -> Response:
        """End the requests of one answer, or all."""
        api.check_sender(request, same_origin=True)
        body = b""
        async for part in request.stream():
            if len(body := body + part) > BODY_LIMIT:
                raise InvalidRequestError(f"the body must have at most {BODY_LIMIT} bytes")
        order = AbortOrder.parse(body)
        reply = await client.query("abort", api.health_timeout, order.rid or None)
        return json_response(responses.Aborted(reply.count))

    async def debug_engine(_: Request) -> Response:
        """Running and waiting requests, and why they wait; pages, the radix tree, the last steps."""
        return Response((await client.query("debug", api.health_timeout)).shown, media_type="application/json")

    async def steps(last: int) -> AsyncIterator[bytes]:
        while client.dead is None and not client.draining:
            with contextlib.suppress(EngineDeadError):  # a step may take longer
                reply = await client.query("steps", api.health_timeout, last)
                last = reply.count
                yield reply.shown
            await asyncio.sleep(STEPS_POLL)

    async def debug_events(_: Request) -> Response:
        """Every step from here on, as server-sent events."""
        last = (await client.ping(api.health_timeout)).steps
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(steps(last), headers=headers, media_type="text/event-stream")

    routes = [
        ApiRoute("GET", "/health", health, responses.Health),
        ApiRoute("GET", "/health_generate", health_generate, responses.Health),
        ApiRoute("GET", "/ready", ready, responses.IsReady),
        ApiRoute("GET", "/version", version, responses.Version),
        ApiRoute("GET", "/server_info", server_info, responses.ServerInfo),
        ApiRoute("GET", "/get_server_info", server_info),
        ApiRoute("GET", "/model_info", model_info, responses.ModelFacts),
        ApiRoute("GET", "/get_model_info", model_info),
        ApiRoute("GET", "/v1/loads", loads, responses.Loads),
        ApiRoute("GET", "/load", load, responses.ServerLoad),
        ApiRoute("GET", "/metrics", metrics, str),
        ApiRoute("POST", "/flush_cache", flush_cache, responses.FlushReport),
        ApiRoute("POST", "/abort_request", abort_request, responses.Aborted, [AbortOrder]),
    ]
    if api.config.debug_endpoints:
        routes.append(ApiRoute("GET", "/debug/engine", debug_engine, dict[str, Any]))
        routes.append(ApiRoute("GET", "/debug/events", debug_events, events=StepRecord))
    return routes


@dataclasses.dataclass
class Throughput:
    """Tokens/s between two questions; the first one asks from `since` on."""

    since: float
    generated: int = 0

    def since_last(self, generated: int) -> float:
        now = time.monotonic()
        rate = (generated - self.generated) / max(now - self.since, 1e-3)
        self.since, self.generated = now, generated
        return rate


def describe_loads(stats: EngineStats, page_size: int, throughput: float) -> responses.Loads:
    used, waiting = stats.pages_held * page_size, stats.waiting_tokens
    size, requests = stats.pages_total * page_size, stats.running + stats.waiting
    usage, utilization = used / max(size, 1), stats.running / max(stats.max_running, 1)
    rank = responses.RankLoad(
        num_running_reqs=stats.running, num_waiting_reqs=stats.waiting, num_total_reqs=requests,
        num_waiting_uncached_tokens=waiting, num_used_tokens=used, num_total_tokens=used + waiting,
        max_total_num_tokens=size, max_running_requests=stats.max_running, token_usage=usage, utilization=utilization,
        cache_hit_rate=stats.cached_prompt_tokens / max(stats.prompt_tokens, 1), gen_throughput=throughput,
    )  # fmt: skip
    together = {
        "total_running_reqs": stats.running, "total_waiting_reqs": stats.waiting, "total_reqs": requests,
        "total_tokens": used + waiting,
    }  # fmt: skip
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return responses.Loads(timestamp=now, version=__version__, loads=[rank], aggregate=together)
