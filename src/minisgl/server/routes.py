"""The endpoints that generate, and those around them."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minisgl.server.api import Api
from minisgl.server.chat_answer import ChatAnswer
from minisgl.server.errors import BODY_LIMIT, BodyTooLargeError
from minisgl.server.generation import Generation
from minisgl.server.native_answer import NativeAnswer
from minisgl.server.openapi import described
from minisgl.server.responses import ModelCard, ModelList, json_response
from minisgl.server.streaming import Chunks, stream_response, unless_disconnected
from minisgl.server.text_answer import TextAnswer
from minisgl.server.tokens import detokenize, tokenize, tokenizer_info
from minisgl.server.unsupported import add_unsupported

DRAIN_LIMIT = 4 * BODY_LIMIT
"""Bytes of a body that is too large are read up to here, so that the client gets to read the answer."""


class AnyAnswer(Protocol):
    """An answer of any endpoint."""

    async def whole(self) -> Any:
        """Generate all of it; what JSON is made of."""

    def chunks(self) -> Chunks:
        """Generate it piece by piece, as server-sent events."""


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


async def respond(request: Request, stream: bool | None, answer: AnyAnswer) -> Response:
    """The answer as the request wants it, whole or streamed. The requests end when the client leaves."""
    if stream:
        return await stream_response(request, answer.chunks())
    return json_response(await unless_disconnected(request.receive, answer.whole()))


def make_router(api: Api) -> APIRouter:
    """The endpoints of one served model."""
    router = APIRouter()

    @router.post("/v1/chat/completions", **described("chat"))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        raw = await read_body(request)
        body, requests, reading = await asyncio.to_thread(api.prepare_chat, raw)
        generation = Generation(api.service, api.tokenizer, requests, copies=body.num_choices, keep=reading.keep)
        return await respond(request, body.stream, ChatAnswer(generation, api.model.name, body, reading))

    @router.post("/v1/completions", **described("completion"))
    async def completions(request: Request) -> Response:
        """Continue one text, or several."""
        raw = await read_body(request)
        body, requests, echoes = await asyncio.to_thread(api.prepare_completion, raw)
        generation = Generation(api.service, api.tokenizer, requests, copies=body.drawn, hidden=body.scores_only)
        return await respond(request, body.stream, TextAnswer(generation, api.model.name, body, echoes))

    @router.post("/generate", **described("generate"))
    async def generate(request: Request) -> Response:
        """Continue one text, or several, in SGLang's own words."""
        raw = await read_body(request)
        body, requests = await asyncio.to_thread(api.prepare_generate, raw)
        generation = Generation(api.service, api.tokenizer, requests, copies=body.num_choices)
        return await respond(request, body.stream, NativeAnswer(generation, body))

    @router.post("/tokenize", **described("tokenize"))
    async def tokenize_text(request: Request) -> Response:
        """The tokens of a text or of a conversation."""
        return json_response(await asyncio.to_thread(tokenize, api, await read_body(request)))

    @router.post("/detokenize", **described("detokenize"))
    async def detokenize_tokens(request: Request) -> Response:
        """The text of tokens."""
        return json_response(await asyncio.to_thread(detokenize, api, await read_body(request)))

    @router.get("/tokenizer_info", **described("tokenizer_info"))
    async def get_tokenizer_info() -> Response:
        """The special tokens and the chat template."""
        return json_response(tokenizer_info(api))

    def card(name: str) -> ModelCard:
        return ModelCard(id=name, created=api.created, max_model_len=api.model.max_seq_len)

    @router.get("/v1/models", **described("models"))
    async def list_models() -> Response:
        """The one model served, under each of its names."""
        return json_response(ModelList([card(name) for name in api.names or (api.model.name,)]))

    @router.get("/v1/models/{name:path}", **described("model"))
    async def get_model(name: str) -> Response:
        """The model served, by its id."""
        api.check_model(name)
        return json_response(card(name))

    add_unsupported(router)
    return router
