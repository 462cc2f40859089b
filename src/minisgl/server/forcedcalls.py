"""The grammar of an answer that has to be a call, and of one that has to be of a form or a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minisgl.core.types import Calls, Grammar
from minisgl.server.callforms import CallForm
from minisgl.server.messages import Tool
from minisgl.server.protocol import ChatRequest

SUBSCHEMAS = frozenset(
    {"items", "additionalItems", "contains", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"}
    | {"propertyNames", "not", "if", "then", "else"}
)
SUBSCHEMA_LISTS = frozenset({"prefixItems", "items", "allOf", "anyOf", "oneOf"})
SUBSCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def forced_grammar(chat: ChatRequest) -> Grammar:
    """A JSON list of calls of the tools that may be called: one, or several where the request allows it."""
    name = chat.forced_tool
    tools = [tool for tool in chat.offered_tools if name is None or tool.function.name == name]
    return Grammar(kind="json_schema", source=calls_schema(tools, name is not None or single(chat)))


def optional_calls(chat: ChatRequest, form: CallForm) -> Calls:
    """Calls as the model writes them, beside the form that the request asks for."""
    if form.listed:
        return Calls(schema=calls_schema(chat.offered_tools, single(chat)), several=False, opening=form.opening)
    schema, definitions = call_schema(chat.offered_tools, "parameters" if form.at_start else "arguments")
    return Calls(
        schema=json.dumps({**schema, "$defs": definitions}),
        several=not single(chat),
        opening="" if form.at_start else form.opening,
        closing=form.closing,
        separator=";" if form.at_start else "",
    )


def single(chat: ChatRequest) -> bool:
    """Whether there may be one call at most."""
    return chat.parallel_tool_calls is False


def calls_schema(tools: Sequence[Tool], one: bool) -> str:
    """The JSON schema of a list of calls, as text."""
    calls, definitions = call_schema(tools, "arguments")
    most = {"maxItems": 1} if one else {}
    return json.dumps({"type": "array", "items": calls, "minItems": 1, **most, "$defs": definitions})


def call_schema(tools: Sequence[Tool], arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of a call, and its definitions: each tool's own schema, whose references go there.

    `arguments` is the name that the model has for them.
    """
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        place = f"#/$defs/arguments{index}"
        definitions[f"arguments{index}"] = moved(tool.arguments_schema, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, arguments: {"$ref": place}},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}, definitions


def moved(schema: Any, place: str) -> Any:
    """A schema whose references within itself begin at `place`; it walks schemas only, so that constants stay."""
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[key] = place + value[1:]
        elif key in SUBSCHEMA_LISTS and isinstance(value, list):
            result[key] = [moved(item, place) for item in value]
        elif key in SUBSCHEMAS:
            result[key] = moved(value, place)
        elif key in SUBSCHEMA_MAPS and isinstance(value, dict):
            result[key] = {name: moved(item, place) for name, item in value.items()}
        else:
            result[key] = value
    return result
