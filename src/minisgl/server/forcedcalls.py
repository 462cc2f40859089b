"""The grammar of an answer that has to be a call, and of one that has to be of a form or a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minisgl.errors import UnsupportedParameterError
from minisgl.server.callforms import CallForm
from minisgl.server.messages import Tool
from minisgl.server.protocol import ChatRequest
from minisgl.server.structured import field_of
from minisgl.types import Calls, Grammar

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
    calls, definitions = call_schema(tools, "arguments")
    schema = {"type": "array", "items": calls, "minItems": 1, "$defs": definitions}
    if name is not None or chat.parallel_tool_calls is False:
        schema["maxItems"] = 1
    return Grammar(kind="json_schema", source=json.dumps(schema))


def optional_calls(chat: ChatRequest, form: CallForm) -> Calls:
    """Calls as the model writes them, beside the form that the request asks for.

    Raises UnsupportedParameterError for a model that begins them with a special token, which no grammar can ask for.
    """
    if form.listed:
        field = field_of(chat.structured)
        raise UnsupportedParameterError(
            f"{field} together with tools is not supported with this model's way of writing calls: "
            f"give tool_choice none or required, or no {field}",
            param=field,
        )
    schema, definitions = call_schema(chat.offered_tools, "parameters" if form.at_start else "arguments")
    return Calls(
        schema=json.dumps({**schema, "$defs": definitions}),
        several=chat.parallel_tool_calls is not False,
        opening="" if form.at_start else form.opening,
        closing=form.closing,
        separator=";" if form.at_start else "",
    )


def call_schema(tools: Sequence[Tool], arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of a call, and its definitions: each tool's own schema, whose references go there.

    `arguments` is the name that the model has for them.
    """
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        place = f"#/$defs/arguments{index}"
        schema = tool.for_template()["function"]["parameters"]
        definitions[f"arguments{index}"] = moved(schema, place)
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
