"""The grammar of an answer that has to be a call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minisgl.server.messages import Tool
from minisgl.server.protocol import ChatRequest
from minisgl.types import Grammar

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
    single = name is not None or chat.parallel_tool_calls is False
    return Grammar(kind="json_schema", source=json.dumps(calls_schema(tools, single)))


def calls_schema(tools: Sequence[Tool], single: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls; each tool's own schema is a definition, and its references go there."""
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        place = f"#/$defs/arguments{index}"
        schema = tool.for_template()["function"]["parameters"]
        definitions[f"arguments{index}"] = moved(schema, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": items, "minItems": 1, "$defs": definitions}
    return {**schema, "maxItems": 1} if single else schema


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
