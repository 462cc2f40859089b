"""The grammar of a completion: the structured output that a request asks for, and tool calls."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from minisgl.core.types import Calls, Grammar
from minisgl.errors import InvalidRequestError
from minisgl.server.protocol import ChatRequest, ResponseFormat, StructuredOutputs, Tool, require
from minisgl.server.tools import ToolFormat
from minisgl.text.json_schema import rewritten

# Kinds of grammars by the names of fields, those of StructuredOutputs without `guided_`.
GRAMMAR_KINDS: Mapping[str, Literal["json_schema", "regex", "choice", "lark"]] = {
    "json": "json_schema", "json_schema": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark",
    "ebnf": "lark",
}  # fmt: skip


def requested_grammar(constraints: Mapping[str, Any]) -> tuple[Grammar | None, str | None]:
    """The grammar that the constraints ask for, not checked, and the field that does; (None, None) for plain text."""
    found: dict[str, Grammar] = {}
    compact = False
    for name, value in constraints.items():
        match value:
            case ResponseFormat():
                grammar = format_grammar(value)
            case StructuredOutputs():
                compact = value.disable_any_whitespace is True
                optional = compact and len(constraints) > 1
                grammar = outputs_grammar(value) if value.constraints or not optional else None
            case _:
                grammar = make_grammar(name.removeprefix("guided_"), value)
        if grammar is not None:
            found[name] = grammar
    fields = list(found)
    if len(fields) > 1:
        raise InvalidRequestError(f"{' and '.join(fields)} exclude each other", param=fields[1])
    return (msgspec.structs.replace(found[fields[0]], compact=compact), fields[0]) if fields else (None, None)


def format_grammar(asked: ResponseFormat) -> Grammar | None:
    param, schema = "response_format", asked.json_schema
    plain = asked.type != "json_schema"
    require(plain == (schema is None), f"{param} has a json_schema where its type says so", f"{param}.json_schema")
    if schema is None:
        return None if asked.type == "text" else Grammar(kind="json_object")
    value = rewritten(schema.schema, lenient=True) if schema.strict is False else schema.schema
    return make_grammar("json", value)


def outputs_grammar(outputs: StructuredOutputs) -> Grammar:
    given = outputs.constraints
    require(len(given) == 1, "structured_outputs must hold exactly one constraint", "structured_outputs")
    param = "structured_outputs.json_object"
    require(outputs.json_object is not False, f"{param} must be true", param)
    return make_grammar(given[0], getattr(outputs, given[0]))


def make_grammar(kind: str, value: Any) -> Grammar:
    if kind == "json_object":
        return Grammar(kind="json_object")
    source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Grammar(kind=GRAMMAR_KINDS[kind], source=source)


def forced_call_grammar(chat: ChatRequest) -> Grammar:
    """A JSON list of calls of the tools that may be called: one, or several where the request allows it."""
    name = chat.named_tool
    tools = [tool for tool in chat.offered_tools if name is None or tool.function.name == name]
    single = name is not None or chat.parallel_tool_calls is False
    return Grammar(kind="json_schema", source=call_list_schema(tools, single))


def text_without_calls(tool_format: ToolFormat) -> Grammar:
    return Grammar(kind="lark", source=f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*{tool_format.opening}.*)/")


def with_optional_calls(grammar: Grammar, chat: ChatRequest, tool_format: ToolFormat) -> Grammar:
    single, opening = chat.parallel_tool_calls is False, tool_format.opening
    if tool_format.listed:
        calls = Calls(schema=call_list_schema(chat.offered_tools, single), several=False, opening=opening)
    elif tool_format.at_start:
        call = call_schema(chat.offered_tools, "parameters")
        calls = Calls(schema=json.dumps(call), several=not single, separator=";")
    else:
        call = call_schema(chat.offered_tools, "arguments")
        calls = Calls(schema=json.dumps(call), several=not single, opening=opening, closing=tool_format.closing)
    return msgspec.structs.replace(grammar, calls=calls)


def call_list_schema(tools: Sequence[Tool], single: bool) -> str:
    most = {"maxItems": 1} if single else {}
    return json.dumps({"type": "array", "items": call_schema(tools, "arguments"), "minItems": 1, **most})


def call_schema(tools: Sequence[Tool], arguments: str) -> dict[str, Any]:
    """The JSON schema of a call; `arguments` is the model's name for what it calls the tool with."""
    calls: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        schema = {"additionalProperties": False} if tool.function.parameters is None else tool.function.parameters
        # Its references begin at its own `$id`; with a `$schema`, older drafts would ignore that beside `$ref`.
        schema = {**schema, "type": "object", "$id": f"urn:tool:{index}"}
        schema.pop("$schema", None)
        followed = rewritten(schema, lenient=True) if tool.function.strict is False else schema
        properties = {"name": {"const": tool.function.name}, arguments: followed}
        required = ["name", arguments]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    return calls[0] if len(calls) == 1 else {"anyOf": calls}
