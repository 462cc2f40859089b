"""The grammar of an answer: the structured output that a request asks for, and tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from minisgl.errors import InvalidRequestError
from minisgl.server.protocol import ChatRequest, NativeSampling, OpenAIRequest
from minisgl.server.tools import ToolFormat
from minisgl.server.validation import ResponseFormat, StructuredOutputs, Tool, require
from minisgl.types import Calls, Grammar

SUBSCHEMAS = frozenset(
    {"items", "additionalItems", "contains", "additionalProperties", "unevaluatedItems", "unevaluatedProperties"}
    | {"propertyNames", "not", "if", "then", "else"}
)
SUBSCHEMA_LISTS = frozenset({"prefixItems", "items", "allOf", "anyOf", "oneOf"})
SUBSCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def requested_grammar(body: OpenAIRequest | NativeSampling) -> tuple[Grammar | None, str | None]:
    """The grammar that a request asks for and the field that does, (None, None) for plain text.

    Raises InvalidRequestError naming the field. `GrammarCompiler.check` says whether the grammar can be enforced.
    """
    found: dict[str, Grammar] = {}
    schema: str | dict[str, Any] | bool | None
    if isinstance(body, NativeSampling):
        schema, regex, choice, grammar = body.json_schema, body.regex, None, body.ebnf
    else:
        schema, regex, choice, grammar = body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar
        if body.response_format is not None and (asked := format_grammar(body.response_format)) is not None:
            found["response_format"] = asked
        if body.structured_outputs is not None:
            found["structured_outputs"] = outputs_grammar(body.structured_outputs)
    if schema is not None:
        found["guided_json"] = schema_grammar(schema, "guided_json")
    if regex is not None:
        found["guided_regex"] = Grammar(kind="regex", source=regex)
    if choice is not None:
        found["guided_choice"] = choice_grammar(choice)
    if grammar is not None:
        found["guided_grammar"] = Grammar(kind="lark", source=grammar)
    fields = list(found)
    if len(fields) > 1:
        raise InvalidRequestError(f"{' and '.join(fields)} exclude each other", param=fields[1])
    return (found[fields[0]], fields[0]) if fields else (None, None)


def format_grammar(asked: ResponseFormat) -> Grammar | None:
    """OpenAI's `response_format`, None for plain text."""
    param = "response_format"
    require(asked.type is not None, f"{param}.type is required", f"{param}.type")
    if asked.type != "json_schema":
        rule = f"{param}.json_schema is only allowed with the type json_schema"
        require(asked.json_schema is None, rule, f"{param}.json_schema")
        return None if asked.type == "text" else Grammar(kind="json_object")
    param += ".json_schema"
    if asked.json_schema is None:
        raise InvalidRequestError(f"{param} is required", param=param)
    if asked.json_schema.schema is None:
        raise InvalidRequestError(f"{param}.schema is required", param=f"{param}.schema")
    return schema_grammar(asked.json_schema.schema, f"{param}.schema")


def outputs_grammar(asked: StructuredOutputs) -> Grammar:
    """vLLM's `structured_outputs`."""
    param = "structured_outputs"
    given = [name for name in asked.__struct_fields__ if getattr(asked, name) is not None]
    require(len(given) == 1, f"{param} must hold exactly one constraint", param)
    require(asked.json_object is not False, f"{param}.json_object must be true", f"{param}.json_object")
    if asked.json is not None:
        return schema_grammar(asked.json, f"{param}.json")
    if asked.choice is not None:
        return choice_grammar(asked.choice)
    if asked.regex is not None:
        return Grammar(kind="regex", source=asked.regex)
    return Grammar(kind="json_object") if asked.grammar is None else Grammar(kind="lark", source=asked.grammar)


def schema_grammar(schema: str | dict[str, Any] | bool, param: str) -> Grammar:
    """A JSON schema as a value or as its text."""
    if isinstance(schema, str):
        return Grammar(kind="json_schema", source=schema)
    try:
        return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False, allow_nan=False))
    except ValueError as error:
        raise InvalidRequestError(f"{param} must not hold NaN or infinite numbers", param=param) from error


def choice_grammar(texts: Sequence[str]) -> Grammar:
    return Grammar(kind="choice", source=json.dumps(texts, ensure_ascii=False))


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
