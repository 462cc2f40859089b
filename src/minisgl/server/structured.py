"""The grammars of tool calls: of a completion that is one, and of one that may be."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from minisgl.core.types import Calls, Grammar
from minisgl.server.protocol import ChatRequest, Tool
from minisgl.server.tools import ToolFormat
from minisgl.text.json_schema import rewritten


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
