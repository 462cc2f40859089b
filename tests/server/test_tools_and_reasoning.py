import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import templates
from helpers.serving import CHAT_TEMPLATE, MODEL, Serving, serving
from minisgl.core.types import Calls, Grammar

pytestmark = pytest.mark.serving(template=templates.QWEN_TOOLS, max_seq_len=2048)

USER: list[Any] = [{"role": "user", "content": "weather in Köln?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
CALL = '{"name": "get_weather", "arguments": {"city":  "Köln"}}'
ARGUMENTS = '{"city":  "Köln"}'
TWO = f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "get_time", "arguments": {{}}}}\n</tool_call>'


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER = tool("get_weather", CITY, description="Look it up.")
ZONED = tool("get_time", {"type": "object", "properties": {"zone": {"type": "string"}}})
ZONE = '{"zone": "CET"}'
SCHEMA = {"type": "object", "properties": {"sun": {"type": "boolean"}}, "required": ["sun"]}
FORM: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}


async def chat(server: Serving, **body: Any) -> dict[str, Any]:
    """The choice of a whole completion."""
    response = await server.http.post("/v1/chat/completions", json={"messages": USER, **body})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def prompt_of(server: Serving) -> str:
    """The last request's prompt."""
    return server.tokenizer.decode(list(server.engine.seen[-1].prompt), skip_special_tokens=False)


def functions(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments of the calls."""
    calls = choice["message"].get("tool_calls", ())
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


async def streamed(server: Serving, **body: Any) -> tuple[str, str, dict[int, dict[str, str]], str | None]:
    """Content, reasoning, calls and the finish reason, put together as a client of OpenAI's does."""
    content, reasoning, finish = "", "", None
    calls: dict[int, dict[str, str]] = {}
    body = {"messages": USER, **body}
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


async def test_an_answer_that_openais_client_parsed_can_be_sent_back(server: Serving) -> None:
    server.speak(f"<tool_call>\n{CALL}\n</tool_call>")
    strict: Any = tool("get_weather", CITY, strict=True)
    parsed = await server.openai.chat.completions.parse(model=MODEL, messages=USER, tools=[strict])
    message = parsed.choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Köln"}
    history: list[Any] = [*USER, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "1"}]
    history += [{"role": "assistant", "content": "{}", "parsed": {}}, *USER]
    await server.openai.chat.completions.create(model=MODEL, messages=history, max_tokens=1)


@pytest.mark.parametrize(
    ("template", "text", "form"),
    [
        (templates.QWEN_TOOLS, "I look.\n" + TWO, "call_"),
        (templates.MISTRAL, f'I look.[TOOL_CALLS] [{CALL}, {{"name": "get_time", "arguments": {{}}}}]', ""),
        (templates.LLAMA, f'{CALL}; {{"name": "get_time", "parameters": {{}}}}', "call_"),
    ],
    ids=["qwen", "mistral", "llama"],
)
async def test_calls_come_whole_and_streamed(server: Serving, template: str, text: str, form: str) -> None:
    server.speak(text)
    choice = await chat(server, tools=[WEATHER, TIME])
    said = None if text.startswith("{") else "I look."
    assert (choice["message"]["content"], choice["finish_reason"]) == (said, "tool_calls")
    calls = choice["message"]["tool_calls"]
    assert functions(choice) == [("get_weather", ARGUMENTS), ("get_time", "{}")]
    assert {call["type"] for call in calls} == {"function"}
    assert len({call["id"] for call in calls}) == 2
    assert all(call["id"].startswith(form) for call in calls)
    content, _, parts, finish = await streamed(server, tools=[WEATHER, TIME])
    assert (content, finish) == (said or "", "tool_calls")
    assert [(part["name"], part["arguments"]) for part in parts.values()] == functions(choice)


async def test_what_the_template_gets_of_tools_and_calls(server: Serving) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Bonn"}'}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    for choice, offered in (("auto", True), (None, True), ("none", False)):
        await chat(server, messages=messages, max_tokens=1, tools=[TIME], tool_choice=choice)
        prompt = prompt_of(server)
        assert ("# Tools" in prompt) == offered
        assert "assistant\n<tool_call>get_weather:[('city', 'Bonn')]</tool_call><|im_end|>" in prompt
        assert "tool\nrain[c1]<|im_end|>" in prompt
        if offered:
            shown = json.loads(prompt.split("# Tools\n")[1].split("\n")[0])
            assert shown["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("extra", "names", "limit"),
    [
        ({"tool_choice": "required"}, ["get_weather", "get_time"], None),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["get_weather", "get_time"], 1),
        ({"tool_choice": {"type": "function", "function": {"name": "get_time"}}}, ["get_time"], 1),
    ],
)
async def test_a_forced_call_is_a_grammar_and_is_read_as_such(
    tmp_path: Path, extra: dict[str, Any], names: Sequence[str], limit: int | None
) -> None:
    checked: list[Grammar] = []
    settings: dict[str, Any] = {"template": templates.QWEN_THINKING, "max_seq_len": 2048}
    async with serving(tmp_path, check_grammar=checked.append, **settings) as server:
        server.speak('[{"name": "get_time", "arguments": {"zone": "CET"}}]')
        choice = await chat(server, tools=[WEATHER, TIME], **extra)
        assert [name for name, _ in functions(choice)] == ["get_time"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
        grammar = server.engine.seen[0].params.grammar
        assert grammar is not None
        assert checked == [grammar]
        assert grammar.kind == "json_schema"
        schema = json.loads(grammar.source)
        items = schema["items"].get("anyOf", [schema["items"]])
        assert [item["properties"]["name"]["const"] for item in items] == names
        assert schema.get("maxItems") == limit
        content, _, parts, finish = await streamed(server, tools=[WEATHER, TIME], **extra)
        assert (content, finish, parts[0]["arguments"]) == ("", "tool_calls", ZONE)


async def test_a_malformed_call_is_content(server: Serving) -> None:
    text = 'So: <tool_call>{"name": "get_weather", "arguments": {"city": }} \n </tool_call> and more'
    server.speak(text)
    choice = await chat(server, tools=[WEATHER])
    assert (choice["message"]["content"], functions(choice), choice["finish_reason"]) == (text, [], "stop")
    content, _, parts, finish = await streamed(server, tools=[WEATHER])
    assert finish == "stop"
    assert (content, parts[0]["arguments"]) == ("So:} \n </tool_call> and more", '{"city": }')


async def test_without_tools_what_looks_like_a_call_is_text(server: Serving) -> None:
    server.speak(TWO)
    for extra in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = await chat(server, **extra)
        assert (choice["message"]["content"], choice["finish_reason"]) == (TWO, "stop")


async def test_one_call_where_parallel_calls_are_off(server: Serving) -> None:
    server.speak(TWO)
    body: dict[str, Any] = {"tools": [WEATHER, TIME], "parallel_tool_calls": False}
    assert len(functions(await chat(server, **body))) == 1
    assert list((await streamed(server, **body))[2]) == [0]


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
async def test_reasoning_is_split_off_where_the_template_knows_it(
    server: Serving, template: str, text: str, extra: dict[str, Any], reasoning: str | None, content: str
) -> None:
    server.speak(text)
    body = {"messages": USER, "logprobs": True, **extra}
    answer = await chat(server, **body)
    assert answer["message"].get("reasoning_content") == reasoning
    assert answer["message"]["content"] == content
    count = len(answer["logprobs"]["content"])
    assert count == len(server.tokenizer.encode(text)) + 1
    entries, said, reasoned = 0, "", ""
    response = await server.http.post("/v1/chat/completions", json={**body, "stream": True})
    for line in re.findall(r"data: (\{.*)", response.text):
        choice = json.loads(line)["choices"][0]
        said += choice["delta"].get("content", "")
        reasoned += choice["delta"].get("reasoning_content", "")
        entries += len(choice["logprobs"]["content"]) if choice["logprobs"] else 0
    assert (said, reasoned or None, entries) == (content, reasoning, count)


@pytest.mark.serving(template=templates.QWEN_THINKING, max_seq_len=2048)
async def test_reasoning_then_calls(server: Serving) -> None:
    server.speak(f"<think>I need <tool_call> here</think>\n\n<tool_call>{CALL}</tool_call>")
    content, reasoning, calls, finish = await streamed(server, tools=[WEATHER])
    assert (content, reasoning, finish) == ("", "I need <tool_call> here", "tool_calls")
    assert calls[0]["arguments"] == ARGUMENTS


@pytest.mark.serving(template=templates.QWEN_THINKING, max_seq_len=2048)
async def test_the_last_message_is_continued(server: Serving) -> None:
    server.speak("</think> 4.")
    messages = [*USER, {"role": "assistant", "content": "<think>\nTwo and two is "}]
    answer = await chat(server, messages=messages, continue_final_message=True)
    assert prompt_of(server).endswith("<|im_start|>assistant\n<think>\nTwo and two is ")
    assert answer["message"]["content"] == "4."


@pytest.mark.parametrize("end", ["", "get_w", "city", "Köl", "}"])
@pytest.mark.parametrize("choice", ["required", "auto"])
@pytest.mark.serving(check_grammar=lambda grammar: None)
async def test_a_call_that_max_tokens_cuts_is_the_same_whole_and_streamed_and_can_be_sent_back(
    server: Serving, choice: Any, end: str
) -> None:
    text = f"[{CALL}]" if choice == "required" else f"<tool_call>{CALL}</tool_call>"
    server.speak(text)
    tokens = len(server.tokenizer.encode(text[: text.index(end) + max(1, len(end))]))
    body: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": tokens}
    answer = await chat(server, **body)
    content, _, calls, finish = await streamed(server, **body)
    assert [(call["name"], call["arguments"]) for call in calls.values()] == functions(answer)
    assert (answer["message"]["content"] or "", answer["finish_reason"]) == (content, finish)
    assert finish == "length"
    assert bool(calls) == (end in ("city", "Köl", "}"))
    assert choice == "auto" or content == ""
    history = [*USER, answer["message"], *USER]
    for call in answer["message"].get("tool_calls", ()):
        history.insert(2, {"role": "tool", "tool_call_id": call["id"], "content": "dry"})
    await chat(server, messages=history, max_tokens=1)
    await chat(server, messages=history, max_tokens=1, tools=[WEATHER])


@pytest.mark.parametrize("template", [templates.QWEN_TOOLS, CHAT_TEMPLATE], ids=["tools", "no tools"])
async def test_earlier_calls_may_have_any_text_as_arguments(server: Serving, template: str) -> None:
    for arguments in ('{"text": "', "", "[]", "5", "null", "no JSON"):
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        await chat(server, messages=[*USER, {"role": "assistant", "content": None, "tool_calls": [call]}], max_tokens=1)
        assert "get_weather" in prompt_of(server)


@pytest.mark.serving(template=CHAT_TEMPLATE, check_grammar=lambda grammar: None)
async def test_a_model_without_a_place_for_tools_is_told_of_them(
    server: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    server.speak(f"<tool_call>\n{CALL}\n</tool_call>")
    for _ in range(2):
        choice = await chat(server, tools=[WEATHER])
        assert (functions(choice), choice["finish_reason"]) == ([("get_weather", ARGUMENTS)], "tool_calls")
    assert prompt_of(server).startswith("<|im_start|>system\nYou may call functions.")
    assert '"name": "get_weather"' in prompt_of(server)
    assert [record.message for record in caplog.records if "no place for tools" in record.message] == [
        "the chat template has no place for tools: a system text lists them, a grammar forms calls"
    ]
    grammar = server.engine.seen[-1].params.grammar
    assert grammar is not None
    assert grammar.calls is not None
    assert (grammar.kind, grammar.calls.opening, grammar.calls.several) == ("lark", "<tool_call>", True)
    content, _, calls, _ = await streamed(server, tools=[WEATHER])
    assert (content, calls[0]["arguments"]) == ("", ARGUMENTS)
    server.speak("It rains.")
    assert (await chat(server, tools=[WEATHER]))["message"]["content"] == "It rains."
    choice, grammar = await ask(server, '{"sun": true}', tools=[WEATHER])
    assert (choice["message"]["content"], json.loads(grammar.source)) == ('{"sun": true}', SCHEMA)
    _, grammar = await ask(server, f"[{CALL}]", tools=[WEATHER], tool_choice="required")
    assert json.loads(grammar.source)["type"] == "array"
    await chat(server, tools=[WEATHER], tool_choice="none", max_tokens=1)
    assert "You may call" not in prompt_of(server)
    tokens = await server.http.post("/tokenize", json={"messages": USER, "tools": [WEATHER]})
    assert "You may call" in server.tokenizer.decode(tokens.json()["tokens"])


async def test_tools_take_the_template_that_is_named_for_them(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text(templates.QWEN_TOOLS)
    async with serving(tmp_path, template=CHAT_TEMPLATE, max_seq_len=2048) as server:
        server.speak(f"<tool_call>{CALL}</tool_call>")
        assert functions(await chat(server, tools=[WEATHER])) == [("get_weather", ARGUMENTS)]
        assert prompt_of(server).startswith("# Tools")
        await chat(server)
        assert prompt_of(server).startswith("<|im_start|>user")


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no place for tools"), (templates.NEITHER, "way of writing tool calls is not known")],
)
async def test_tools_are_refused_where_the_template_cannot_say_them(
    server: Serving, template: str | None, message: str
) -> None:
    for choice in ("auto", "required"):
        body = {"messages": USER, "tools": [WEATHER], "tool_choice": choice}
        error = (await server.http.post("/v1/chat/completions", json=body)).json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")
        assert message in error["message"] or choice == "required"
    silent: dict[str, Any] = {"messages": USER, "tools": [WEATHER], "tool_choice": "none", "max_tokens": 1}
    expected = 400 if template is None else 200
    assert (await server.http.post("/v1/chat/completions", json=silent)).status_code == expected


@pytest.mark.serving(template=templates.QWEN_TOOLS + "{{ reasoning_effort }}", max_seq_len=2048)
async def test_reasoning_effort_goes_to_templates_that_know_it(server: Serving) -> None:
    await chat(server, reasoning_effort="low", max_tokens=1)
    assert prompt_of(server).endswith("low")


async def ask(server: Serving, said: str, **extra: Any) -> tuple[dict[str, Any], Grammar]:
    """What the client gets when the model says this, and what the engine was asked to hold it to."""
    server.speak(said)
    choice = await chat(server, response_format=FORM, **extra)
    grammar = server.engine.seen[-1].params.grammar
    assert grammar is not None
    return choice, grammar


@pytest.mark.parametrize(
    ("template", "name", "marks"),
    [
        (templates.QWEN_TOOLS, "arguments", ("<tool_call>", "</tool_call>", "")),
        (templates.LLAMA, "parameters", ("", "", ";")),
    ],
    ids=["qwen", "llama"],
)
@pytest.mark.serving(check_grammar=lambda grammar: None)
async def test_the_answer_is_of_the_form_or_a_call(
    server: Serving, template: str, name: str, marks: tuple[str, str, str]
) -> None:
    call = f'{marks[0]}{{"name": "get_time", "{name}": {ZONE}}}{marks[1]}'
    choice, grammar = await ask(server, '{"sun": true}', tools=[ZONED])
    assert (choice["message"]["content"], functions(choice)) == ('{"sun": true}', [])
    assert (grammar.kind, json.loads(grammar.source), grammar.reasoning) == ("json_schema", SCHEMA, "none")
    assert isinstance(grammar.calls, Calls)
    assert (grammar.calls.opening, grammar.calls.closing, grammar.calls.separator) == marks
    assert grammar.calls.several
    schema = json.loads(grammar.calls.schema)
    assert schema["required"] == ["name", name]
    assert schema["properties"]["name"] == {"const": "get_time"}
    choice, _ = await ask(server, call, tools=[ZONED])
    assert (choice["message"]["content"], functions(choice)) == (None, [("get_time", ZONE)])
    _, grammar = await ask(server, call, tools=[ZONED], parallel_tool_calls=False)
    assert grammar.calls is not None
    assert not grammar.calls.several
    _, grammar = await ask(server, "{}", tools=[ZONED], tool_choice="none")
    assert grammar.calls is None
    _, grammar = await ask(server, f"[{call}]", tools=[ZONED], tool_choice="required")
    assert json.loads(grammar.source)["type"] == "array"


@pytest.mark.serving(template=templates.MISTRAL, check_grammar=lambda grammar: None)
async def test_the_answer_is_of_the_form_or_a_list_of_calls(server: Serving) -> None:
    call = '[TOOL_CALLS] [{"name": "get_time", "arguments": ' + ZONE + "}]"
    choice, grammar = await ask(server, call, tools=[ZONED], parallel_tool_calls=False)
    assert functions(choice) == [("get_time", ZONE)]
    assert grammar.calls is not None
    assert (grammar.calls.opening, grammar.calls.closing, grammar.calls.several) == ("[TOOL_CALLS]", "", False)
    schema = json.loads(grammar.calls.schema)
    assert (schema["type"], schema["maxItems"]) == ("array", 1)


@pytest.mark.parametrize(
    ("template", "extra", "said", "reasoning"),
    [
        (templates.QWEN_THINKING, {}, '<think>\nso\n</think>\n\n{"sun": true}', "possible"),
        (templates.QWEN_THINKING, {"chat_template_kwargs": {"enable_thinking": False}}, '{"sun": true}', "none"),
        (templates.QWEN_THINKING, {"separate_reasoning": False}, '{"sun": true}', "none"),
        (templates.DEEPSEEK, {}, 'so\n</think>\n\n{"sun": true}', "begun"),
        (templates.QWEN_TOOLS, {}, '{"sun": true}', "none"),
    ],
)
@pytest.mark.serving(check_grammar=lambda grammar: None)
async def test_a_model_that_thinks_may_do_so_before_the_form(
    server: Serving, template: str, extra: dict[str, Any], said: str, reasoning: str
) -> None:
    choice, grammar = await ask(server, said, **extra)
    assert grammar.reasoning == reasoning
    assert choice["message"]["content"] == '{"sun": true}'
    assert choice["message"].get("reasoning_content") == (None if reasoning == "none" else "so")
