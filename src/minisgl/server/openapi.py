"""Routes, and the OpenAPI document: bodies as they are validated, responses as they are encoded, and every status."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

from minisgl import __version__
from minisgl.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    NativeSampling,
    TokenizeConversation,
    TokenizeText,
)
from minisgl.server.responses import (
    Aborted,
    AbortOrder,
    ChatChoice,
    ChunkChoice,
    Detokenized,
    ErrorBody,
    FlushReport,
    Health,
    IsReady,
    ModelCard,
    ModelFacts,
    ModelList,
    NativeResult,
    Result,
    ServerInfo,
    TextChoice,
    TokenizerInfo,
    Tokens,
    Version,
)
from minisgl.server.validation import NULL, ROLES, Body, Message, StructuredOutputs

Handler = Callable[[Request], Awaitable[Response]]

BODIES: Mapping[str, tuple[Any, ...]] = {
    "chat": (ChatRequest,),
    "completion": (CompletionRequest,),
    "generate": (GenerateRequest,),
    "tokenize": (TokenizeText, TokenizeConversation),
    "detokenize": (DetokenizeRequest,),
    "abort_request": (AbortOrder,),
}
RESULTS: Mapping[str, Any] = {
    "chat": Result[ChatChoice],
    "completion": Result[TextChoice],
    "generate": NativeResult | list[NativeResult],
    "tokenize": Tokens,
    "detokenize": Detokenized,
    "tokenizer_info": TokenizerInfo,
    "models": ModelList,
    "model": ModelCard,
    "health": Health,
    "ready": IsReady,
    "version": Version,
    "server_info": ServerInfo,
    "model_info": ModelFacts,
    "flush_cache": FlushReport,
    "abort_request": Aborted,
}
"""What operations answer; text if it is not here."""
STREAMS: Mapping[str, Any] = {
    "chat": Result[ChunkChoice],
    "completion": Result[TextChoice],
    "generate": NativeResult,
}
"""What the events of a stream hold."""
ERRORS: Mapping[int, str] = {
    400: "The request can never be served as it is; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, or no such endpoint.",
    413: "The body is too large.",
    429: "Too much is waiting; come again after Retry-After seconds.",
    431: "The headers are too large.",
    499: "The operator ended the request.",
    500: "A fault of the server; its log says more.",
    503: "The engine is gone, the server is shutting down, or too many requests are live.",
    504: "The request took longer than the server allows.",
}
RULES: Mapping[str, Any] = {
    "Message": ROLES,
    "GenerateRequest": [
        {"required": [given], "properties": {given: {"not": NULL}, other: NULL}}
        for given, other in (("text", "input_ids"), ("input_ids", "text"))
    ],
}
"""What bodies must be beside their fields: one of these."""
WITH_UNSUPPORTED: Sequence[type[Body]] = (
    ChatRequest, CompletionRequest, GenerateRequest, NativeSampling, TokenizeConversation, Message, StructuredOutputs,
)  # fmt: skip


class ApiRoute(Route):
    """A route that middleware finds in the scope; `operation` is its name in the document, None for none there."""

    def __init__(self, methods: Sequence[str], path: str, handler: Handler, operation: str | None = None) -> None:
        super().__init__(path, handler, methods=methods)
        self.methods = set(methods)  # HEAD is left to the middleware
        self.method = methods[0]
        self.operation = operation

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self}


def document(routes: Sequence[Any]) -> dict[str, Any]:
    """The whole document. Every endpoint can answer with every error."""
    bodies = [body for several in BODIES.values() for body in several]
    structs = [*RESULTS.values(), *STREAMS.values(), *bodies, ErrorBody]
    references, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    described = dict(zip(map(str, structs), references, strict=True))
    for body in WITH_UNSUPPORTED:
        schemas[body.__name__]["properties"] |= {n: {"enum": [None, *values]} for n, values in body.unsupported.items()}
    for name, rule in RULES.items():
        schemas[name]["oneOf"] = rule
    paths: dict[str, Any] = {}
    for route in routes:
        if isinstance(route, ApiRoute) and route.operation is not None:
            path = route.path.replace(":path}", "}")
            paths.setdefault(path, {})[route.method.lower()] = describe(route, route.operation, described)
    info = {"title": "Mini-SGLang", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def describe(route: ApiRoute, name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """An operation; `described` has references to the schemas of types."""
    error = described[str(ErrorBody)]
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if name in RESULTS:
        content = {"application/json": {"schema": described[str(RESULTS[name])]}}
    if name in STREAMS:
        # A server-sent event as OpenAPI 3.2 describes them; the last is [DONE], or an error.
        value = {"anyOf": [described[str(STREAMS[name])], error]}
        event = {"contentMediaType": "application/json", "contentSchema": value}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, event]}
        content["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
        }
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status, text in ERRORS.items():
        responses[str(status)] = {"description": text, "content": {"application/json": {"schema": error}}}
    operation: dict[str, Any] = {
        "operationId": name, "description": inspect.getdoc(route.endpoint), "responses": responses
    }  # fmt: skip
    if route.param_convertors:
        text_schema = {"type": "string"}
        operation["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": text_schema}
            for parameter in route.param_convertors
        ]
    if name in BODIES:
        schemas = [described[str(body)] for body in BODIES[name]]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
