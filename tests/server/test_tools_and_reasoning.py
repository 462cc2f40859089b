from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import templates
from helpers.serving import MODEL, Serving, serve_and
from minisgl.core.types import Grammar

USER: list[Any] = [{"role": "user", "content": "weather in Köln?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look it up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
CALL = '{"name": "get_weather", "arguments": {"city":  "Köln"}}'
ARGUMENTS = '{"city":  "Köln"}'
TWO = f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "get_time", "arguments": {{}}}}\n</tool_call>'


async def streamed(server: Serving, **body: Any) -> tuple[str, str, dict[int, dict[str, str]], str | None]:
    """Content, reasoning, calls and the finish reason, put together as a client of OpenAI's does."""
    content, reasoning, finish = "", "", None
    calls: dict[int, dict[str, str]] = {}
    async for chunk in await server.openai.chat.completions.create(model=MODEL, stream=True, **body):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            if call.index not in calls:
                assert (call.type, call.function.arguments) == ("function", "")
                calls[call.index] = {"id": str(call.id), "name": str(call.function.name), "arguments": ""}
            else:
                assert (call.id, call.function.name) == (None, None)
            calls[call.index]["arguments"] += call.function.arguments or ""
        finish = choice.finish_reason or finish
    return content, reasoning, calls, finish


def test_an_answer_that_openais_client_parsed_can_be_sent_back(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        server.speak(f"<tool_call>\n{CALL}\n</tool_call>")
        tool: Any = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
        parsed = await server.openai.chat.completions.parse(model=MODEL, messages=USER, tools=[tool])
        message = parsed.choices[0].message
        assert message.tool_calls is not None
        assert message.tool_calls[0].function.parsed_arguments == {"city": "Köln"}
        history: list[Any] = [
            *USER,
            message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"},
        ]
        history += [{"role": "assistant", "content": "{}", "parsed": {}}, *USER]
        await server.openai.chat.completions.create(model=MODEL, messages=history, max_tokens=1)

    serve_and(tmp_path, check, max_seq_len=1024, template=templates.QWEN_TOOLS)


@pytest.mark.parametrize(
    ("template", "text", "form"),
    [
        (templates.QWEN_TOOLS, "I look.\n" + TWO, "call_"),
        (templates.MISTRAL, f'I look.[TOOL_CALLS] [{CALL}, {{"name": "get_time", "arguments": {{}}}}]', ""),
        (templates.LLAMA, f'{CALL}; {{"name": "get_time", "parameters": {{}}}}', "call_"),
    ],
    ids=["qwen", "mistral", "llama"],
)
def test_calls_come_whole_and_streamed(tmp_path: Path, template: str, text: str, form: str) -> None:
    async def check(server: Serving) -> None:
        server.speak(text)
        body: dict[str, Any] = {"messages": USER, "tools": [WEATHER, TIME]}
        answer = await server.openai.chat.completions.create(model=MODEL, **body)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        said = None if text.startswith("{") else "I look."
        assert choice.message.content == said
        calls = choice.message.tool_calls or []
        assert [(c.function.name, c.function.arguments) for c in calls if c.type == "function"] == [
            ("get_weather", ARGUMENTS),
            ("get_time", "{}"),
        ]
        assert len({call.id for call in calls}) == 2
        assert all(call.id.startswith(form) for call in calls)
        content, _, parts, finish = await streamed(server, **body)
        assert (content, finish) == (said or "", "tool_calls")
        assert [(p["name"], p["arguments"]) for p in parts.values()] == [("get_weather", ARGUMENTS), ("get_time", "{}")]

    serve_and(tmp_path, check, template=template, max_seq_len=2048)


def test_what_the_template_gets_of_tools_and_calls(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        function = {"name": "get_weather", "arguments": '{"city": "Bonn"}'}
        messages = [
            *USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        ]
        body: dict[str, Any] = {"messages": messages, "max_tokens": 1, "tools": [TIME]}
        for choice, offered in (("auto", True), (None, True), ("none", False)):
            response = await server.http.post("/v1/chat/completions", json={**body, "tool_choice": choice})
            assert response.status_code == 200, response.text
            prompt = server.tokenizer.decode(server.engine.seen[-1].prompt.tolist(), skip_special_tokens=False)
            assert ("# Tools" in prompt) == offered
            assert "assistant\n<tool_call>get_weather:[('city', 'Bonn')]</tool_call><|im_end|>" in prompt
            assert "tool\nrain[c1]<|im_end|>" in prompt
            if offered:
                tool = json.loads(prompt.split("# Tools\n")[1].split("\n")[0])
                assert tool["function"]["parameters"] == {"type": "object", "properties": {}}

    serve_and(tmp_path, check, template=templates.QWEN_TOOLS, max_seq_len=2048)  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "names", "limit"),
    [
        ({"tool_choice": "required"}, ["get_weather", "get_time"], None),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["get_weather", "get_time"], 1),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, ["get_time"], 1),
    ],
)
def test_a_forced_call_is_a_grammar_and_is_read_as_such(
    tmp_path: Path, extra: dict[str, Any], names: Sequence[str], limit: int | None
) -> None:
    checked: list[Grammar] = []

    async def check(server: Serving) -> None:
        server.speak('[{"name": "get_time", "arguments": {"zone": "CET"}}]')
        body = {"messages": USER, "tools": [WEATHER, TIME], **extra}
        answer = await server.openai.chat.completions.create(model=MODEL, **body)
        calls = answer.choices[0].message.tool_calls or []
        assert [c.function.name for c in calls if c.type == "function"] == ["get_time"]
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
        grammar = server.engine.seen[0].params.grammar
        assert grammar is not None
        assert checked == [grammar]
        assert grammar.kind == "json_schema"
        schema = json.loads(grammar.source)
        items = schema["items"].get("anyOf", [schema["items"]])
        assert [item["properties"]["name"]["const"] for item in items] == names
        assert schema.get("maxItems") == limit
        content, _, parts, finish = await streamed(server, **body)
        assert (content, finish, parts[0]["arguments"]) == ("", "tool_calls", '{"zone": "CET"}')

    serve_and(tmp_path, check, template=templates.QWEN_THINKING, check_grammar=checked.append, max_seq_len=2048)


def test_a_malformed_call_is_content(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        text = 'So: <tool_call>{"name": "get_weather", "arguments": {"city": }}</tool_call> and more'
        server.speak(text)
        body = {"messages": USER, "tools": [WEATHER]}
        choice = (await server.openai.chat.completions.create(model=MODEL, **body)).choices[0]  # type: ignore[call-overload]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        content, _, parts, finish = await streamed(server, **body)
        assert finish == "stop"
        assert (content, parts[0]["arguments"]) == ("So:}</tool_call> and more", '{"city": }')

    serve_and(tmp_path, check, template=templates.QWEN_TOOLS, max_seq_len=2048)


def test_without_tools_what_looks_like_a_call_is_text(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        server.speak(TWO)
        for extra in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            answer = await server.openai.chat.completions.create(model=MODEL, messages=USER, **extra)  # type: ignore[call-overload]
            assert answer.choices[0].message.content == TWO
            assert answer.choices[0].finish_reason == "stop"

    serve_and(tmp_path, check, template=templates.QWEN_TOOLS, max_seq_len=2048)


def test_one_call_where_parallel_calls_are_off(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        server.speak(TWO)
        body = {"messages": USER, "tools": [WEATHER, TIME], "parallel_tool_calls": False}
        answer = await server.openai.chat.completions.create(model=MODEL, **body)  # type: ignore[call-overload]
        assert len(answer.choices[0].message.tool_calls) == 1
        assert list((await streamed(server, **body))[2]) == [0]

    serve_and(tmp_path, check, template=templates.QWEN_TOOLS, max_seq_len=2048)


@pytest.mark.parametrize(
    ("template", "text", "extra", "reasoning", "content"),
    [
        (templates.QWEN_THINKING, "<think>\nhm, hm\n</think>\n\nRain.", {}, "hm, hm", "Rain."),
        (templates.QWEN_THINKING, "Rain.", {"chat_template_kwargs": {"enable_thinking": False}}, None, "Rain."),
        (templates.QWEN_THINKING, "<think>x</think>R", {"separate_reasoning": False}, None, "<think>x</think>R"),
        (templates.DEEPSEEK, "hm\n</think>\n\nRain.", {}, "hm", "Rain."),
        (templates.DEEPSEEK, "hm, and no end", {}, "hm, and no end", ""),
        (templates.QWEN_TOOLS, "<think>x</think>R", {}, None, "<think>x</think>R"),
    ],
)
def test_reasoning_is_split_off_where_the_template_knows_it(
    tmp_path: Path, template: str, text: str, extra: dict[str, Any], reasoning: str | None, content: str
) -> None:
    async def check(server: Serving) -> None:
        server.speak(text)
        body = {"messages": USER, "logprobs": True, **extra}
        answer = (await server.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert answer["message"].get("reasoning_content") == reasoning
        assert answer["message"]["content"] == content
        count = len(answer["logprobs"]["content"])
        assert count == len(server.tokenizer.encode(text)) + 1
        entries, said, thought = 0, "", ""
        async with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    said += choice["delta"].get("content", "")
                    thought += choice["delta"].get("reasoning_content", "")
                    entries += len(choice["logprobs"]["content"]) if choice["logprobs"] else 0
        assert (said, thought or None, entries) == (content, reasoning, count)

    serve_and(tmp_path, check, template=template, max_seq_len=2048)


def test_reasoning_then_calls(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        server.speak(f"<think>I need <tool_call> here</think>\n\n<tool_call>{CALL}</tool_call>")
        content, reasoning, calls, finish = await streamed(server, messages=USER, tools=[WEATHER])
        assert (content, reasoning, finish) == ("", "I need <tool_call> here", "tool_calls")
        assert calls[0]["arguments"] == ARGUMENTS

    serve_and(tmp_path, check, template=templates.QWEN_THINKING, max_seq_len=2048)


def test_the_last_message_is_continued(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        server.speak("</think> 4.")
        messages = [*USER, {"role": "assistant", "content": "<think>\nTwo and two is "}]
        body = {"messages": messages, "continue_final_message": True}
        answer = (await server.http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        prompt = server.tokenizer.decode(server.engine.seen[-1].prompt.tolist(), skip_special_tokens=False)
        assert prompt.endswith("<|im_start|>assistant\n<think>\nTwo and two is ")
        assert answer["message"]["content"] == "4."

    serve_and(tmp_path, check, template=templates.QWEN_THINKING, max_seq_len=2048)


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no place for tools"), (templates.NEITHER, "way of writing tool calls is not known")],
)
def test_tools_are_refused_where_the_template_cannot_say_them(
    tmp_path: Path, template: str | None, message: str
) -> None:
    async def check(server: Serving) -> None:
        for choice in ("auto", "required"):
            body = {"messages": USER, "tools": [WEATHER], "tool_choice": choice}
            error = (await server.http.post("/v1/chat/completions", json=body)).json()["error"]
            assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
            assert message in error["message"] or choice == "required"
        silent: dict[str, Any] = {"messages": USER, "tools": [WEATHER], "tool_choice": "none", "max_tokens": 1}
        expected = 400 if template is None else 200
        assert (await server.http.post("/v1/chat/completions", json=silent)).status_code == expected

    serve_and(tmp_path, check, template=template)


def test_reasoning_effort_goes_to_templates_that_know_it(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        body = {"messages": USER, "reasoning_effort": "low", "max_tokens": 1}
        assert (await server.http.post("/v1/chat/completions", json=body)).status_code == 200
        assert server.tokenizer.decode(server.engine.seen[0].prompt.tolist()).endswith("low")

    serve_and(tmp_path, check, template=templates.QWEN_TOOLS + "{{ reasoning_effort }}", max_seq_len=2048)
