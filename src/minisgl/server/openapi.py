"""The OpenAPI document: bodies as they are validated, responses as they are encoded, and every status there can be."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from minisgl.server.native import DetokenizeRequest, GenerateRequest, TokenizeConversation, TokenizeText
from minisgl.server.native_answer import NativeResult
from minisgl.server.protocol import ChatRequest, CompletionRequest
from minisgl.server.reports import Aborted, AbortOrder, Flush, IsReady, ModelFacts, ServerInfo, Version
from minisgl.server.responses import (
    ChatChoice,
    ChunkChoice,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Result,
    TextChoice,
)
from minisgl.server.tokens import Text, TokenizerInfo, Tokens

REF = "#/components/schemas/"
RESPONSE = "Response"
"""What the names of response schemas begin with: some are those of a body's parts too."""
RESPONSE_REF = REF + RESPONSE + "{name}"

BODIES: Mapping[str, tuple[type[BaseModel], ...]] = {
    "chat": (ChatRequest,),
    "completion": (CompletionRequest,),
    "generate": (GenerateRequest,),
    "tokenize": (TokenizeText, TokenizeConversation),
    "detokenize": (DetokenizeRequest,),
}
RESULTS: Mapping[str, Any] = {
    "chat": Result[ChatChoice],
    "completion": Result[TextChoice],
    "generate": NativeResult,
    "tokenize": Tokens,
    "detokenize": Text,
    "tokenizer_info": TokenizerInfo,
    "models": ModelList,
    "model": ModelCard,
    "health": Health,
    "ready": IsReady,
    "version": Version,
    "server_info": ServerInfo,
    "model_info": ModelFacts,
    "flush_cache": Flush,
    "abort_request": Aborted,
}
ORDERS: Mapping[str, Any] = {"abort_request": AbortOrder}
"""Bodies that msgspec reads."""
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
    503: "The engine or a tokenizer is gone, the server is shutting down, or too many requests are live.",
    504: "The request took longer than the server allows.",
}


def described(name: str) -> dict[str, Any]:
    """What the document says of one endpoint, as arguments of FastAPI's route decorators."""
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if name in RESULTS:
        result = response_schema(RESULTS[name])
        if name == "generate":
            result = {"anyOf": [result, {"type": "array", "items": result}]}
        content = {"application/json": {"schema": result}}
    if name in STREAMS:
        content["text/event-stream"] = {"schema": event_schema(STREAMS[name])}
    described: dict[str, Any] = {"responses": {200: {"description": "The answer.", "content": content}}}
    if name in BODIES or name in ORDERS:
        schemas = [{"$ref": REF + model.__name__} for model in BODIES.get(name, ())]
        schemas += [response_schema(ORDERS[name])] if name in ORDERS else []
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        described["openapi_extra"] = {"requestBody": body}
    return described


def event_schema(struct: Any) -> dict[str, Any]:
    """A server-sent event of a stream, as OpenAPI 3.2 describes them; the last is [DONE], or an error."""
    json = {"anyOf": [response_schema(struct), response_schema(ErrorBody)]}
    told = {"contentMediaType": "application/json", "contentSchema": json}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def response_schema(struct: Any) -> dict[str, Any]:
    """A reference to the schema of what an endpoint answers."""
    (found,), _ = msgspec.json.schema_components([struct], ref_template=RESPONSE_REF)
    return found


def schemas() -> dict[str, Any]:
    """Every schema that the document refers to."""
    models = [(model, "validation") for several in BODIES.values() for model in several]
    _, bodies = models_json_schema(models, ref_template=REF + "{model}")  # type: ignore[arg-type]
    structs = [*dict.fromkeys([*RESULTS.values(), *STREAMS.values()]), *ORDERS.values(), ErrorBody]
    _, results = msgspec.json.schema_components(structs, ref_template=RESPONSE_REF)
    return {**bodies["$defs"], **{RESPONSE + name: schema for name, schema in results.items()}}


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document. Every endpoint can answer with every error but FastAPI's own 422.

    That never happens here: a parameter of a path is any text.
    """
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    content = {"application/json": {"schema": response_schema(ErrorBody)}}
    for operations in made["paths"].values():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            for status, text in ERRORS.items():
                responses.setdefault(str(status), {"description": text, "content": content})
    kept = made.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        kept.pop(name, None)
    kept |= schemas()
    return made


def install_document(app: FastAPI) -> None:
    """Have `app` serve this document; it is made once, when it is first asked for."""
    app.openapi = functools.cache(lambda: document(app))  # type: ignore[method-assign]
