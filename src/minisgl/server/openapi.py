"""Endpoints that say what they take and answer, and the OpenAPI document made from them."""

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from minisgl import __version__
from minisgl.server.protocol import Body
from minisgl.server.responses import ErrorBody

ERRORS: Mapping[int, str] = {
    400: "The request can never be served as it is; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The Host is not a name of this server, or a web page of another origin asks.",
    404: "There is no such model, or no such endpoint.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body's Content-Type is not JSON.",
    429: "Too much is waiting; come again after Retry-After seconds.",
    431: "The headers are too large.",
    499: "The operator ended the request.",
    500: "A fault of the server; its log says more.",
    503: "The engine is gone, the server is shutting down, or too many requests are live.",
    504: "The request took longer than the server allows.",
}
NULL: dict[str, Any] = {"type": "null"}
GIVEN: dict[str, Any] = {"not": NULL}
NO_CALLS: dict[str, Any] = {"tool_calls": {"enum": [None, []]}, "reasoning_content": {"enum": [None, ""]}}
USER: dict[str, Any] = {"role": {"enum": ["system", "developer", "user"]}, "content": GIVEN, "tool_call_id": NULL}
TOOL: dict[str, Any] = {"role": {"const": "tool"}, "content": GIVEN, "tool_call_id": GIVEN}
# Which fields of a body go together, as its checks have it.
RULES: dict[str, dict[str, Any]] = {
    "Message": {
        "oneOf": [
            {"properties": USER | NO_CALLS, "required": ["role", "content"]},
            {"properties": {"role": {"const": "assistant"}, "tool_call_id": NULL}, "required": ["role"]},
            {"properties": TOOL | NO_CALLS, "required": ["role", "content", "tool_call_id"]},
        ]
    },
    "GenerateRequest": {
        "oneOf": [
            {"required": ["text"], "properties": {"text": GIVEN, "input_ids": NULL}},
            {"required": ["input_ids"], "properties": {"input_ids": GIVEN, "text": NULL}},
        ]
    },
}


class ApiRoute(NamedTuple):
    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    result: Any = None  # the type of its answer: `str` is plain text, None that there is none but a stream
    bodies: Sequence[Any] = ()  # the types of its body
    events: Any = None  # the type of a stream's events; without any type it is left out of the document

    def operation(self, schemas: Mapping[str, Any]) -> dict[str, Any]:
        error = {"application/json": {"schema": schemas[str(ErrorBody)]}}
        content: dict[str, Any] = {}
        if self.result is not None:
            kind = "text/plain" if self.result is str else "application/json"
            content[kind] = {"schema": schemas[str(self.result)]}
        if self.events is not None:
            # A server-sent event as OpenAPI 3.2 describes them. Of an answer's events the last is [DONE], or an error.
            values, end = [schemas[str(self.events)]], []
            if self.result is not None:
                values, end = [*values, schemas[str(ErrorBody)]], [{"const": "[DONE]"}]
            event = {"contentMediaType": "application/json", "contentSchema": {"anyOf": values}}
            data = {"type": "string", "anyOf": [*end, event]}
            stream = {"type": "object", "properties": {"data": data}, "required": ["data"]}
            content["text/event-stream"] = {"schema": stream}
        responses = {str(status): {"description": text, "content": error} for status, text in ERRORS.items()}
        responses["200"] = {"description": "The answer.", "content": content}
        name, text = getattr(self.handler, "__name__", ""), inspect.getdoc(self.handler)
        described: dict[str, Any] = {"operationId": name, "description": text, "responses": responses}
        if params := re.findall(r"{(\w+)", self.path):
            place: dict[str, Any] = {"in": "path", "required": True, "schema": {"type": "string"}}
            described["parameters"] = [{"name": name, **place} for name in params]
        if self.bodies:
            body = {"anyOf": [schemas[str(kind)] for kind in self.bodies]}
            described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        return described


def document(routes: Sequence[ApiRoute]) -> dict[str, Any]:
    """Every endpoint can answer with every error."""
    routes = [route for route in routes if (route.result, route.events) != (None, None)]
    types = [kind for route in routes for kind in (route.result, *route.bodies, route.events) if kind is not None]
    types.append(ErrorBody)
    references, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(map(str, types), references, strict=True))
    for body in subclasses(Body):
        if body.__name__ in components:
            unsupported = {name: {"enum": [None, *values]} for name, values in body.unsupported.items()}
            components[body.__name__]["properties"] |= unsupported
            components[body.__name__] |= RULES.get(body.__name__, {})
            if components[body.__name__].get("additionalProperties") is False:
                components[body.__name__]["additionalProperties"] = NULL
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = route.operation(schemas)
    info = {"title": "Mini-SGLang", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}}


def subclasses(base: type[Body]) -> list[type[Body]]:
    return [found for direct in base.__subclasses__() for found in (direct, *subclasses(direct))]
