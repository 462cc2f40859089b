"""The grammar of an answer: the structured output that a request asks for, and tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from minisgl.core.types import Calls, Grammar
from minisgl.errors import InvalidRequestError
from minisgl.server.protocol import ChatRequest, OpenAIRequest, SglangSampling
from minisgl.server.tools import ToolFormat
from minisgl.server.validation import ResponseFormat, Tool, require

SUBSCHEMAS = frozenset(
    {"items", "additionalItems", "contains", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"}
    | {"propertyNames", "not", "if", "then", "else"}
)
SUBSCHEMA_LISTS = frozenset({"prefixItems", "items", "allOf", "anyOf", "oneOf"})
SUBSCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def requested_grammar(body: OpenAIRequest | SglangSampling) -> tuple[Grammar | None, str | None]:
    """The grammar that a request asks for and the field that does, (None, None) for plain text.

    Raises InvalidRequestError naming the field. `GrammarCompiler.check` says whether the grammar can be enforced.
    """
    found: dict[str, Grammar] = {}
    guided: dict[str, Any]
    if isinstance(body, SglangSampling):
        guided = {"json": body.json_schema, "regex": body.regex, "grammar": body.ebnf}
    else:
        guided = {name: getattr(body, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
        if body.response_format is not None and (grammar := format_grammar(body.response_format)) is not None:
            found["response_format"] = grammar
        if (outputs := body.structured_outputs) is not None:
            given = [name for name in outputs.__struct_fields__ if getattr(outputs, name) is not None]
            require(len(given) == 1, "structured_outputs must hold exactly one constraint", "structured_outputs")
            param = f"structured_outputs.{given[0]}"
            require(outputs.json_object is not False, f"{param} must be true", param)
            found["structured_outputs"] = make_grammar(given[0], getattr(outputs, given[0]), param)
    for name, value in guided.items():
        if value is not None:
            found[f"guided_{name}"] = make_grammar(name, value, f"guided_{name}")
    fields = list(found)
    if len(fields) > 1:
        raise InvalidRequestError(f"{' and '.join(fields)} exclude each other", param=fields[1])
    return (found[fields[0]], fields[0]) if fields else (None, None)


def format_grammar(asked: ResponseFormat) -> Grammar | None:
    """OpenAI's `response_format`, None for plain text."""
    param, schema = "response_format", asked.json_schema
    require(asked.type is not None, f"{param}.type is required", f"{param}.type")
    plain = asked.type != "json_schema"
    require(plain == (schema is None), f"{param} has a json_schema where its type says so", f"{param}.json_schema")
    if schema is None:
        return None if asked.type == "text" else Grammar(kind="json_object")
    param += ".json_schema.schema"
    require(schema.schema is not None, f"{param} is required", param)
    return make_grammar("json", schema.schema, param)


def make_grammar(kind: str, value: Any, param: str) -> Grammar:
    """The grammar of a constraint, whose kind is one of the fields of `StructuredOutputs`."""
    if kind == "json" and not isinstance(value, str):
        try:
            return Grammar(kind="json_schema", source=json.dumps(value, ensure_ascii=False, allow_nan=False))
        except ValueError as error:
            raise InvalidRequestError(f"{param} must not hold NaN or infinite numbers", param=param) from error
    if kind == "json":
        return Grammar(kind="json_schema", source=value)
    if kind == "choice":
        return Grammar(kind="choice", source=json.dumps(value, ensure_ascii=False))
    if kind == "json_object":
        return Grammar(kind="json_object")
    return Grammar(kind="lark" if kind == "grammar" else "regex", source=value)


def forced_call_grammar(chat: ChatRequest) -> Grammar:
    """A JSON list of calls of the tools that may be called: one, or several where the request allows it."""
    name = chat.named_tool
    tools = [tool for tool in chat.offered_tools if name is None or tool.function.name == name]
    single = name is not None or chat.parallel_tool_calls is False
    return Grammar(kind="json_schema", source=call_list_schema(tools, single))


def with_optional_calls(grammar: Grammar, chat: ChatRequest, tool_format: ToolFormat) -> Grammar:
    """The same grammar, or calls as the model writes them."""
    if tool_format.listed:
        schema = call_list_schema(chat.offered_tools, chat.parallel_tool_calls is False)
        calls = Calls(schema=schema, several=False, opening=tool_format.opening)
    else:
        at_start = tool_format.at_start
        call, definitions = call_schema(chat.offered_tools, "parameters" if at_start else "arguments")
        calls = Calls(
            schema=json.dumps({**call, "$defs": definitions}),
            several=chat.parallel_tool_calls is not False,
            opening="" if at_start else tool_format.opening,
            closing=tool_format.closing,
            separator=";" if at_start else "",
        )
    return msgspec.structs.replace(grammar, calls=calls)


def call_list_schema(tools: Sequence[Tool], single: bool) -> str:
    """The JSON schema of a list of calls, as text."""
    call, definitions = call_schema(tools, "arguments")
    most = {"maxItems": 1} if single else {}
    return json.dumps({"type": "array", "items": call, "minItems": 1, **most, "$defs": definitions})


def call_schema(tools: Sequence[Tool], arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON schema of a call, and its definitions: each tool's own schema, whose references go there.

    `arguments` is the model's name for them. They are an object also where the tool's schema takes that for granted.
    """
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        place = f"#/$defs/arguments{index}"
        parameters = tool.function.parameters
        schema = {"additionalProperties": False} if parameters is None else parameters
        definitions[f"arguments{index}"] = moved({**schema, "type": "object"}, place)
        properties = {"name": {"const": tool.function.name}, arguments: {"$ref": place}}
        required = ["name", arguments]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
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
