"""The ASGI application: the endpoints that generate and those around them, streams, errors and the web page."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send

from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server import protocol, responses
from minisgl.server.admin import Setup, admin_routes
from minisgl.server.completion import ChatCompletion, Generation, SglangCompletion, TextCompletion
from minisgl.server.errors import BODY_LIMIT, BodyTooLargeError, error_body, error_headers, internal_error
from minisgl.server.openapi import ApiRoute, document
from minisgl.server.preparation import Api, PreparedRequest

DRAIN_LIMIT = 4 * BODY_LIMIT
"""Bytes of a body that is too large are read up to here, so that the client gets to read the answer."""
UNSUPPORTED = (
    *("embeddings", "moderations", "responses", "files", "batches", "uploads", "realtime", "rerank", "score"),
    *("audio", "images", "videos", "fine_tuning", "assistants", "threads", "vector_stores", "evals", "containers"),
    *("conversations", "messages", "engines", "edits", "organization", "skills"),
)
"""Endpoints of other servers beneath /v1, refused by name; the next are those outside."""
UNSUPPORTED_OUTSIDE = ("embeddings", "rerank", "score", "pooling", "classify", "encode")
PAGE = Path(__file__).with_name("page.html")

T = TypeVar("T")
AnyCompletion = type[ChatCompletion] | type[TextCompletion] | type[SglangCompletion]

logger = logging.getLogger(__name__)


class UnsupportedEndpointError(InvalidRequestError):
    """An endpoint that other servers have and this one has not."""

    status = 404
    code = "unsupported_endpoint"


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


class Endpoints:
    """The endpoints of one served model."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.preparation = api.preparation

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        prepared = await self.api.prepare(self.preparation.chat, await read_body(request))
        return await self.respond(request, prepared, ChatCompletion)

    async def completion(self, request: Request) -> Response:
        """Continue one text, or several."""
        prepared = await self.api.prepare(self.preparation.completion, await read_body(request))
        return await self.respond(request, prepared, TextCompletion)

    async def generate(self, request: Request) -> Response:
        """Continue one text, or several, in SGLang's own words."""
        prepared = await self.api.prepare(self.preparation.generate, await read_body(request))
        return await self.respond(request, prepared, SglangCompletion)

    async def respond(self, request: Request, prepared: PreparedRequest, kind: AnyCompletion) -> Response:
        """The answer, whole or streamed. The requests end when the client leaves."""
        generation = Generation(self.api.service, self.preparation.tokenizer, prepared)
        completion = kind(generation, self.preparation.model.name)
        if not prepared.body.stream:
            return responses.json_response(await unless_disconnected(request.receive, completion.whole()))
        chunks = completion.chunks()
        try:
            first = await unless_disconnected(request.receive, anext(chunks))
        except BaseException:
            await chunks.aclose()
            raise
        return EventStream(first, chunks)

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text or of a conversation."""
        return responses.json_response(await self.api.prepare(self.preparation.tokenize, await read_body(request)))

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        return responses.json_response(await self.api.prepare(self.preparation.detokenize, await read_body(request)))

    async def tokenizer_info(self, _: Request) -> Response:
        """The special tokens and the chat template."""
        return responses.json_response(self.preparation.tokenizer_info())

    async def models(self, _: Request) -> Response:
        """The one model served, under each of its names."""
        return responses.json_response(responses.ModelList([self.model_card(name) for name in self.preparation.names]))

    async def model(self, request: Request) -> Response:
        """The model served, by its id."""
        name = request.path_params["name"]
        self.preparation.check_model(name)
        return responses.json_response(self.model_card(name))

    def model_card(self, name: str) -> responses.ModelCard:
        return responses.ModelCard(id=name, created=self.api.created, max_model_len=self.preparation.model.max_seq_len)

    def routes(self) -> list[ApiRoute]:
        chat, chunk = responses.Result[responses.ChatChoice], responses.Result[responses.ChunkChoice]
        text, sglang = responses.Result[responses.TextChoice], responses.SglangResult | list[responses.SglangResult]
        tokenize = [protocol.TokenizeText, protocol.TokenizeConversation]
        return [
            ApiRoute("POST", "/v1/chat/completions", self.chat, chat, [protocol.ChatRequest], chunk),
            ApiRoute("POST", "/v1/completions", self.completion, text, [protocol.CompletionRequest], text),
            ApiRoute("POST", "/generate", self.generate, sglang, [protocol.GenerateRequest], responses.SglangResult),
            ApiRoute("POST", "/tokenize", self.tokenize, responses.Tokens, tokenize),
            ApiRoute("POST", "/detokenize", self.detokenize, responses.Detokenized, [protocol.DetokenizeRequest]),
            ApiRoute("GET", "/tokenizer_info", self.tokenizer_info, responses.TokenizerInfo),
            ApiRoute("GET", "/v1/models", self.models, responses.ModelList),
            ApiRoute("GET", "/v1/models/{name:path}", self.model, responses.ModelCard),
        ]


def make_app(api: Api, setup: Setup) -> Starlette:
    """All endpoints, with their document and their errors."""
    routes = [*Endpoints(api).routes(), *admin_routes(api, setup)]
    openapi = functools.cache(lambda: document(routes))
    html, headers = PAGE.read_text(encoding="utf-8"), page_headers()

    async def show_document(_: Request) -> Response:
        return responses.json_response(openapi())

    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    routes += [ApiRoute("GET", "/openapi.json", show_document), ApiRoute("GET", "/", page)]
    for base in [f"/v1/{name}" for name in UNSUPPORTED] + [f"/{name}" for name in UNSUPPORTED_OUTSIDE]:
        for path in (base, base + "/{rest:path}"):
            routes.append(ApiRoute("GET POST PUT PATCH DELETE", path, refuse_endpoint))
    kinds = (MinisglError, HTTPException, Exception, ClientGoneError, ClientDisconnect)
    return Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, on_error))


async def refuse_endpoint(request: Request) -> Response:
    raise UnsupportedEndpointError(f"{request.url.path} is not supported by this server")


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


async def disconnected(receive: Receive) -> None:
    """Return when the client leaves; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled and ClientGoneError raised when the client leaves first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await cancel(task)
        await cancel(watch)


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()


class EventStream(Response):
    """A response of server-sent events; `first` is the chunk that was waited for before the status was known.

    An error after the headers becomes an event of its own, in the form of an error body. The stream always ends with
    `[DONE]`, unless the client leaves: then `rest` is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first = first
        self.rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        async with aclosing(self.rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_disconnected(receive, self._send(send))
            except ClientGoneError:
                logger.debug("a client left while its answer was streamed")

    async def _send(self, send: Send) -> None:
        await send_body(send, self.first)
        try:
            async for chunk in self.rest:
                await send_body(send, chunk)
        except MinisglError as error:
            await send_body(send, responses.sse(error_body(error)))
        except Exception:
            logger.exception("a stream failed")
            await send_body(send, responses.sse(error_body(internal_error())))
        await send_body(send, responses.SSE_DONE, more=False)


def send_body(send: Send, chunk: bytes, more: bool = True) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": chunk, "more_body": more})


async def on_error(request: Request, error: Exception) -> Response:
    """Every error that leaves an endpoint, in OpenAI's form. Of a fault of ours only the log has the details."""
    if isinstance(error, (ClientGoneError, ClientDisconnect)):
        return Response(status_code=499)  # nginx's "client closed request", for the log
    if isinstance(error, HTTPException):  # the router's 404 and 405
        shown = MinisglError(f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase}")
        shown.type = "invalid_request_error" if error.status_code < 500 else "server_error"
        shown.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return responses.json_response(error_body(shown), error.status_code, dict(error.headers or {}))
    known = error if isinstance(error, MinisglError) else internal_error()
    return responses.json_response(error_body(known), known.status, error_headers(known))


def page_headers() -> dict[str, str]:
    """The headers of the page: its own style and script and requests to this server, nothing else (W3C, CSP 3)."""
    html = PAGE.read_text(encoding="utf-8")
    allowed = {}
    for tag in ("style", "script"):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
