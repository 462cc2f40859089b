"""The endpoints."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minisgl.server.answers import Answer, ChatAnswer, TextAnswer
from minisgl.server.api import Api
from minisgl.server.errors import BODY_LIMIT, BodyTooLargeError
from minisgl.server.generation import Generation
from minisgl.server.protocol import Sampling
from minisgl.server.responses import ModelCard, ModelList, json_response
from minisgl.server.streaming import stream_response, unless_disconnected

DRAIN_LIMIT = 4 * BODY_LIMIT
"""Bytes of a body that is too large are read up to here, so that the client gets to read the answer."""


async def read_body(request: Request) -> bytes:
    """The body; raises BodyTooLargeError beyond `BODY_LIMIT` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= BODY_LIMIT:
            parts.append(part)
        elif size > DRAIN_LIMIT:
            break
    if size > BODY_LIMIT:
        raise BodyTooLargeError(f"the body must have at most {BODY_LIMIT} bytes")
    return b"".join(parts)


async def respond(request: Request, body: Sampling, answer: Answer) -> Response:
    """The answer as the request wants it, whole or streamed. The requests end when the client leaves."""
    if body.stream:
        return await stream_response(request, answer.chunks())
    return json_response(await unless_disconnected(request.receive, answer.whole()))


def make_router(api: Api) -> APIRouter:
    """The endpoints of one served model."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        raw = await read_body(request)
        body, requests = await asyncio.to_thread(api.prepare_chat, raw)
        generation = Generation(api.service, api.tokenizer, requests)
        return await respond(request, body, ChatAnswer(generation, api.model.name, body.include_usage))

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue one text, or several."""
        raw = await read_body(request)
        body, requests = await asyncio.to_thread(api.prepare_completion, raw)
        generation = Generation(api.service, api.tokenizer, requests)
        return await respond(request, body, TextAnswer(generation, api.model.name, body.include_usage))

    def card() -> ModelCard:
        return ModelCard(id=api.model.name, created=api.created, max_model_len=api.model.max_seq_len)

    @router.get("/v1/models")
    async def list_models() -> Response:
        """The one model served."""
        return json_response(ModelList([card()]))

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """The model served, by its id."""
        api.check_model(name)
        return json_response(card())

    @router.get("/health")
    async def health() -> Response:
        """200 when the engine answers between two of its steps, 503 when it does not."""
        stats = await api.service.ping(api.health_timeout)
        return json_response({"status": "ok", "running": stats.running, "waiting": stats.waiting})

    return router
