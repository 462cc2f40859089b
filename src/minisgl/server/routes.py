"""The endpoints that generate, and those around them."""

from __future__ import annotations

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
from minisgl.server.prepared import Prepared
from minisgl.server.responses import ModelCard, ModelList, json_response
from minisgl.server.streaming import Chunks, stream_response, unless_disconnected
from minisgl.server.text_answer import TextAnswer
from minisgl.server.tokens import tokenizer_info
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


async def respond(request: Request, stream: bool, answer: AnyAnswer) -> Response:
    """The answer as the request wants it, whole or streamed. The requests end when the client leaves."""
    if stream:
        return await stream_response(request, answer.chunks())
    return json_response(await unless_disconnected(request.receive, answer.whole()))


def make_router(api: Api) -> APIRouter:
    """The endpoints of one served model."""
    router = APIRouter()

    def generation(asked: Prepared) -> Generation:
        return Generation(
            api.service,
            api.tokenizer,
            asked.requests,
            copies=asked.wanted.copies,
            keep=asked.reading.keep,
            hidden=asked.wanted.hidden,
        )

    @router.post("/v1/chat/completions", **described("chat"))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        asked = await api.prepare("chat", await read_body(request))
        answer = ChatAnswer(generation(asked), api.model.name, asked.wanted, asked.reading)
        return await respond(request, asked.wanted.stream, answer)

    @router.post("/v1/completions", **described("completion"))
    async def completions(request: Request) -> Response:
        """Continue one text, or several."""
        asked = await api.prepare("completion", await read_body(request))
        answer = TextAnswer(generation(asked), api.model.name, asked.wanted, asked.echoes)
        return await respond(request, asked.wanted.stream, answer)

    @router.post("/generate", **described("generate"))
    async def generate(request: Request) -> Response:
        """Continue one text, or several, in SGLang's own words."""
        asked = await api.prepare("generate", await read_body(request))
        return await respond(request, asked.wanted.stream, NativeAnswer(generation(asked), asked.wanted))

    @router.post("/tokenize", **described("tokenize"))
    async def tokenize_text(request: Request) -> Response:
        """The tokens of a text or of a conversation."""
        return Response(await api.convert("tokenize", await read_body(request)), media_type="application/json")

    @router.post("/detokenize", **described("detokenize"))
    async def detokenize_tokens(request: Request) -> Response:
        """The text of tokens."""
        return Response(await api.convert("detokenize", await read_body(request)), media_type="application/json")

    @router.get("/tokenizer_info", **described("tokenizer_info"))
    async def get_tokenizer_info() -> Response:
        """The special tokens and the chat template."""
        return json_response(tokenizer_info(api.preparation))

    def card(name: str) -> ModelCard:
        return ModelCard(id=name, created=api.created, max_model_len=api.model.max_seq_len)

    @router.get("/v1/models", **described("models"))
    async def list_models() -> Response:
        """The one model served, under each of its names."""
        return json_response(ModelList([card(name) for name in api.names or (api.model.name,)]))

    @router.get("/v1/models/{name:path}", **described("model"))
    async def get_model(name: str) -> Response:
        """The model served, by its id."""
        api.preparation.check_model(name)
        return json_response(card(name))

    add_unsupported(router)
    return router
