"""The ASGI application: the endpoints that generate and those around them, streams, errors and the web page."""

import base64
import hashlib
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from minisgl.config import priority_ranges
from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server import errors, protocol, responses
from minisgl.server.admin import admin_routes
from minisgl.server.completion import Generation
from minisgl.server.generate import GenerateRequest
from minisgl.server.openapi import ApiRoute, document
from minisgl.server.preparation import Api, unless_disconnected
from minisgl.server.responses import SSE_DONE, json_response, sse

PAGE = Path(__file__).with_name("page.html")

logger = logging.getLogger(__name__)


class NamedRoute(Route):
    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self}  # for the access log and the metrics


def model_routes(api: Api) -> list[ApiRoute]:
    preparation, served = api.preparation, api.preparation.model
    priorities = priority_ranges(api.config.client_priorities)  # by the number of the API key

    async def respond(request: Request, completion: Generation) -> Response:
        allowed = priorities.get(request.scope.get("api_key", 0), priorities.get(0))
        if (priority := completion.body.priority) is not None and allowed is not None:
            low, high = allowed
            rule = f"priority must be between {low} and {high}, got {priority}"
            protocol.require(low <= priority <= high, rule, "priority")
            completion.requests = [msgspec.structs.replace(each, priority=priority) for each in completion.requests]
        await api.check(completion, request)
        if not completion.body.stream:
            return json_response(await unless_disconnected(request.receive, completion.whole(api.client)))
        return EventStream(completion.chunks(api.client))

    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, await api.prepare(preparation.chat, request))

    async def completion(request: Request) -> Response:
        """Continue one text, or several."""
        return await respond(request, await api.prepare(preparation.completion, request, renders=False))

    async def generate(request: Request) -> Response:
        """Continue one text, or several, in SGLang's own words."""
        return await respond(request, await api.prepare(preparation.generate, request, renders=False))

    async def tokenize(request: Request) -> Response:
        """The tokens of a text or of a conversation."""
        return json_response(await api.prepare(preparation.tokenize, request))

    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        return json_response(await api.prepare(preparation.detokenize, request))

    async def tokenizer_info(_: Request) -> Response:
        """The special tokens and the chat template."""
        tokenizer = preparation.tokenizer
        template = None if tokenizer.chat_template is None else tokenizer.chat_template.source
        tokens: Any = {f"{name}_token": tokenizer.tokens.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        info = responses.TokenizerInfo(
            **tokens, tokenizer_class=tokenizer.kind, chat_template=template, vocab_size=served.vocab_size,
            model_max_length=served.max_seq_len,
        )  # fmt: skip
        return json_response(info)

    def model_card(name: str) -> responses.ModelCard:
        return responses.ModelCard(id=name, created=api.created, root=served.name, max_model_len=served.max_seq_len)

    async def models(_: Request) -> Response:
        """The one model served, under each of its names."""
        return json_response(responses.ModelList(list(map(model_card, preparation.names))))

    async def model(request: Request) -> Response:
        """The model served, by its id."""
        preparation.check_model(request.path_params["name"])
        return json_response(model_card(request.path_params["name"]))

    chats, chunk = responses.Result[responses.ChatChoice], responses.Result[responses.ChunkChoice]
    text, sglang = responses.Result[responses.TextChoice], responses.SglangResult | list[responses.SglangResult]
    tokenized = [protocol.TokenizeText, protocol.TokenizeConversation]
    return [
        ApiRoute("POST", "/v1/chat/completions", chat, chats, [protocol.ChatRequest], chunk),
        ApiRoute("POST", "/v1/completions", completion, text, [protocol.CompletionRequest], text),
        ApiRoute("POST", "/generate", generate, sglang, [GenerateRequest], responses.SglangResult),
        ApiRoute("POST", "/tokenize", tokenize, responses.Tokens, tokenized),
        ApiRoute("POST", "/detokenize", detokenize, responses.Detokenized, [protocol.DetokenizeRequest]),
        ApiRoute("GET", "/tokenizer_info", tokenizer_info, responses.TokenizerInfo),
        ApiRoute("GET", "/v1/models", models, responses.ModelList),
        ApiRoute("GET", "/v1/models/{name:path}", model, responses.ModelCard),
        ApiRoute("POST", "/v1/tokenize", tokenize),
        ApiRoute("POST", "/v1/detokenize", detokenize),
    ]


def make_app(api: Api) -> Starlette:
    routes = [*model_routes(api), *admin_routes(api)]
    html = PAGE.read_text(encoding="utf-8")
    headers = page_headers(html)

    async def show_document(_: Request) -> Response:
        return json_response(document(routes))

    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    routes += [ApiRoute("GET", "/openapi.json", show_document), ApiRoute("GET", "/", page)]
    kinds = (MinisglError, HTTPException, Exception, ClientDisconnect)
    named = [NamedRoute(route.path, route.handler, methods=[route.method]) for route in routes]
    return Starlette(routes=named, exception_handlers=dict.fromkeys(kinds, on_error))


class EventStream(StreamingResponse):
    """Server-sent events; an error after the headers is one too. The last is `[DONE]`, unless the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(chunks, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.chunks, self.begun = chunks, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.chunks):
            try:
                await unless_disconnected(receive, self._send(send))
            except ClientDisconnect:
                if not self.begun:
                    raise
                logger.debug("a client left while its answer was streamed")

    async def _send(self, send: Send) -> None:
        chunk = await anext(self.chunks)  # before it the status is not known
        self.begun = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_body(send, chunk)
        try:
            async for chunk in self.chunks:
                await send_body(send, chunk)
        except Exception as error:
            if not isinstance(error, MinisglError):
                logger.exception("a stream failed")
            await send_body(send, sse(errors.error_body(errors.known_error(error))))
        await send_body(send, SSE_DONE, more=False)


def send_body(send: Send, chunk: bytes, more: bool = True) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": chunk, "more_body": more})


async def on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nginx's "client closed request", for the log
    if isinstance(error, HTTPException):  # the router's 404 and 405
        method = request.method.replace("HEAD", "GET")  # whose length an answer to HEAD has
        code = "unsupported_endpoint" if error.status_code == 404 else "method_not_allowed"
        shown = InvalidRequestError(f"{method} {request.url.path} is not supported by this server", code=code)
        return json_response(errors.error_body(shown), error.status_code, error.headers)
    return errors.error_response(errors.known_error(error))


def page_headers(html: str) -> dict[str, str]:
    """The headers of the page: its own style and script and requests to this server, nothing else (W3C, CSP 3)."""
    allowed = {}
    for tag in ("style", "script"):
        text = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        allowed[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
