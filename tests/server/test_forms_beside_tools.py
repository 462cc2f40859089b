"""Chats that ask for a form of the answer where the model may also call tools, or think first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers import templates
from helpers.serving import MODEL, Serving
from minisgl.types import Calls, Grammar

USER: list[Any] = [{"role": "user", "content": "weather in Köln?"}]
TIME: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
SCHEMA = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
FORM: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
ARGUMENTS = '{"zone": "CET"}'


async def ask(server: Serving, said: str, **extra: Any) -> tuple[dict[str, Any], Grammar]:
    """What the client gets when the model says this, and what the engine was asked to hold it to."""
    server.speak(said)
    body = {"model": MODEL, "messages": USER, "response_format": FORM, **extra}
    response = await server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    grammar = server.engine.seen[-1].params.grammar
    assert grammar is not None
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message, grammar


@pytest.mark.parametrize(
    ("template", "call", "name", "marks"),
    [
        (
            templates.QWEN_TOOLS,
            '<tool_call>\n{"name": "get_time", "arguments": ' + ARGUMENTS + "}\n</tool_call>",
            "arguments",
            ("<tool_call>", "</tool_call>", ""),
        ),
        (templates.LLAMA, '{"name": "get_time", "parameters": ' + ARGUMENTS + "}", "parameters", ("", "", ";")),
    ],
    ids=["qwen", "llama"],
)
@pytest.mark.serving(check_grammar=lambda grammar: None, max_seq_len=2048)
async def test_the_answer_is_of_the_form_or_a_call(
    server: Serving, template: str, call: str, name: str, marks: tuple[str, str, str]
) -> None:
    message, grammar = await ask(server, '{"sun": true}', tools=[TIME])
    assert (message["content"], message.get("tool_calls")) == ('{"sun": true}', None)
    assert (grammar.kind, json.loads(grammar.source), grammar.thought) == ("json_schema", SCHEMA, "none")
    assert isinstance(grammar.calls, Calls)
    assert (grammar.calls.opening, grammar.calls.closing, grammar.calls.separator) == marks
    assert grammar.calls.several
    schema = json.loads(grammar.calls.schema)
    assert schema["required"] == ["name", name]
    assert schema["properties"]["name"] == {"const": "get_time"}
    message, _ = await ask(server, call, tools=[TIME])
    assert message["content"] is None
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "get_time", "arguments": ARGUMENTS}]
    _, grammar = await ask(server, call, tools=[TIME], parallel_tool_calls=False)
    assert grammar.calls is not None
    assert not grammar.calls.several
    _, grammar = await ask(server, "{}", tools=[TIME], tool_choice="none")
    assert grammar.calls is None
    message, grammar = await ask(server, f"[{call}]", tools=[TIME], tool_choice="required")
    assert json.loads(grammar.source)["type"] == "array"


@pytest.mark.serving(template=templates.MISTRAL, check_grammar=lambda grammar: None, max_seq_len=2048)
async def test_the_answer_is_of_the_form_or_a_list_of_calls(server: Serving) -> None:
    call = '[TOOL_CALLS] [{"name": "get_time", "arguments": ' + ARGUMENTS + "}]"
    message, grammar = await ask(server, call, tools=[TIME], parallel_tool_calls=False)
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "get_time", "arguments": ARGUMENTS}]
    assert grammar.calls is not None
    assert (grammar.calls.opening, grammar.calls.closing, grammar.calls.several) == ("[TOOL_CALLS]", "", False)
    schema = json.loads(grammar.calls.schema)
    assert (schema["type"], schema["maxItems"]) == ("array", 1)


@pytest.mark.parametrize(
    ("template", "extra", "said", "thought"),
    [
        (templates.QWEN_THINKING, {}, '<think>\nso\n</think>\n\n{"sun": true}', "possible"),
        (templates.QWEN_THINKING, {"chat_template_kwargs": {"enable_thinking": False}}, '{"sun": true}', "none"),
        (templates.QWEN_THINKING, {"separate_reasoning": False}, '{"sun": true}', "none"),
        (templates.DEEPSEEK, {}, 'so\n</think>\n\n{"sun": true}', "begun"),
        (templates.QWEN_TOOLS, {}, '{"sun": true}', "none"),
    ],
)
@pytest.mark.serving(check_grammar=lambda grammar: None, max_seq_len=2048)
async def test_a_model_that_thinks_may_do_so_before_the_form(
    server: Serving, template: str, extra: dict[str, Any], said: str, thought: str
) -> None:
    message, grammar = await ask(server, said, **extra)
    assert grammar.thought == thought
    assert message["content"] == '{"sun": true}'
    assert message.get("reasoning_content") == (None if thought == "none" else "so")
