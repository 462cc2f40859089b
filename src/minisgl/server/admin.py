"""The operator's endpoints: whether the server works, what it runs with, what it counts, and two levers."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from minisgl import __version__
from minisgl.config import Config
from minisgl.errors import EngineDeadError, InvalidRequestError
from minisgl.server import responses
from minisgl.server.engine_client import DRAIN_RETRY_SECONDS
from minisgl.server.errors import ApiProcessError, DrainingError
from minisgl.server.metrics import CONTENT_TYPE, MetricsPage
from minisgl.server.openapi import ApiRoute
from minisgl.server.preparation import Api
from minisgl.server.responses import json_response

SCRAPE_TIMEOUT = 1.0  # s that /metrics waits for the engine's counts; in a longer step those it gave last are shown
BODY_LIMIT = 4096


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the server was started with, and what the engine made of it: a line for each value."""

    config: Config
    notes: Sequence[str]
    folder: str
    started: float  # s, on the monotonic clock


def admin_routes(api: Api, setup: Setup) -> list[ApiRoute]:
    client, model = api.client, api.preparation.model

    async def health(_: Request) -> Response:
        """200 when the engine and all API processes answer in time, else 503."""
        stats = await client.ping(api.health_timeout)
        if silent := client.metrics.num_silent():
            raise ApiProcessError(f"{silent} of the API processes do not answer")
        return json_response(responses.Health(running=stats.running, waiting=stats.waiting))

    async def ready(_: Request) -> Response:
        """200 when new requests are taken, 503 when the server is going down or the engine is gone."""
        if client.dead is not None:
            raise client.dead
        if client.draining:
            raise DrainingError("the server is shutting down", DRAIN_RETRY_SECONDS)
        return json_response(responses.IsReady())

    async def version(_: Request) -> Response:
        """The version of this program."""
        return json_response(responses.Version(__version__))

    async def server_info(_: Request) -> Response:
        """Configuration without secrets, the engine's choices and counts, this process' queue, uptime (s)."""
        stats = await client.ping(api.health_timeout)
        config = {**dataclasses.asdict(setup.config), "api_key": f"{len(setup.config.api_key)} set"}
        info = responses.ServerInfo(
            version=__version__,
            config=config,
            effective=list(setup.notes),
            stats=stats,
            queued=responses.Queued(client.queue.requests, client.queue.tokens),
            draining=client.draining,
            uptime=round(time.monotonic() - setup.started, 3),
        )
        return json_response(info)

    async def model_info(_: Request) -> Response:
        """The model: its names, where its files are, and what it can take."""
        facts = responses.ModelFacts(
            id=model.name,
            served_names=list(api.preparation.names),
            model_path=setup.folder,
            vocab_size=model.vocab_size,
            max_model_len=model.max_seq_len,
            eos_token_ids=list(model.eos_token_ids),
            has_chat_template=api.preparation.tokenizer.has_chat_template,
        )
        return json_response(facts)

    async def metrics(_: Request) -> Response:
        """Prometheus' page. It never fails: without the engine it has the engine's last counts."""
        with contextlib.suppress(EngineDeadError):
            await client.ping(SCRAPE_TIMEOUT)
        page = MetricsPage(client.metrics, client.stats, client.dead is None, model.name)
        return Response(page.render(), media_type=CONTENT_TYPE)

    async def flush_cache(_: Request) -> Response:
        """Drop every cached page that no request uses."""
        return json_response(responses.FlushReport(await client.flush_cache(api.health_timeout)))

    async def abort_request(request: Request) -> Response:
        """End the requests of one answer, or all."""
        body = b""
        async for part in request.stream():
            if len(body := body + part) > BODY_LIMIT:
                raise InvalidRequestError(f"the body must have at most {BODY_LIMIT} bytes")
        try:
            order = msgspec.json.decode(body, type=responses.AbortOrder)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"the body cannot be read: {error}", code="invalid_json") from error
        if order.abort_all is (order.rid is not None):
            raise InvalidRequestError("give the answer's id as rid, or abort_all", param="rid")
        return json_response(responses.Aborted(await client.abort(order.rid, api.health_timeout)))

    return [
        ApiRoute("GET", "/health", health, responses.Health),
        ApiRoute("GET", "/ready", ready, responses.IsReady),
        ApiRoute("GET", "/version", version, responses.Version),
        ApiRoute("GET", "/server_info", server_info, responses.ServerInfo),
        ApiRoute("GET", "/model_info", model_info, responses.ModelFacts),
        ApiRoute("GET", "/metrics", metrics, str),
        ApiRoute("POST", "/flush_cache", flush_cache, responses.FlushReport),
        ApiRoute("POST", "/abort_request", abort_request, responses.Aborted, [responses.AbortOrder]),
    ]
