"""What templates get, what they may not do, and where they are found."""

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import templates
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.errors import InvalidRequestError, ModelError
from minisgl.text.chat_template import ChatTemplate, TemplateLimitError
from minisgl.text.tokenizer import Tokenizer

STRING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
# Each shows the words of every role; what they take as content differs.
SHAPES = {
    "text": STRING,
    "text letter by letter": PARTS.replace("p.text", "p"),
    "parts": PARTS,
    "parts of a type": PARTS.replace("{{ p.text }}", "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}"),
    "parts chosen": PARTS.replace("in m.content", "in m.content | selectattr('type', 'equalto', 'text')"),
    "the first part": STRING.replace("m.content", "m.content[0].text"),
    "parts joined": STRING.replace("m.content", "m.content | map(attribute='text') | join"),
    "both, text first": STRING.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}",
    ),
    "both, parts first": STRING.replace(
        "{{ m.content }}",
        "{% if m.content is not string and m.content is iterable %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}",
    ),
    "a macro of both": "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}"
    "{% for p in c %}{{ p.text }}{% endfor %}{% endif %}{% endmacro %}"
    + STRING.replace("m.content", "show(m.content)"),
    "parts of the user, text of others": STRING.replace(
        "{{ m.content }}", "{{ m.content[0].text if m.role == 'user' else m.content | upper | lower }}"
    ),
    "parts of the system, text of others": STRING.replace(
        "{{ m.content }}", "{{ m.content[0]['text'] if m.role == 'system' else m.content + '' }}"
    ),
    "a block of parts": PARTS.replace("[{{ m.role }}]", "[{{ m.role }}]{% set body %}").replace(
        "{% endfor %}{% endfor %}", "{% endfor %}{% endset %}{{ body }}{% endfor %}"
    ),
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": [{"type": "text", "text": "three"}, {"type": "text", "text": "four"}]},
]


@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES)
def test_every_template_gets_content_in_the_shape_that_it_shows(source: str) -> None:
    assert ChatTemplate(source, {}).render(TALK, True) == "[system]be brief[user]one[assistant]two[user]three\nfour"


LOSING = {
    "nothing": ("hello", ["user"]),
    "roles only": ("{% for m in messages %}{{ m.role }}{% endfor %}", ["user"]),
    "another key": ("{% for m in messages %}{{ m.text }}{% endfor %}", ["user"]),
    "another key of a part": (PARTS.replace("p.text", "p.words"), ["user"]),
    "no system": ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", ["system", "user"]),
    "no assistant": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ["user", "assistant"]),
}


@pytest.mark.parametrize(("source", "roles"), LOSING.values(), ids=LOSING)
def test_a_template_that_leaves_words_out_is_refused(source: str, roles: list[str]) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(InvalidRequestError, match="leaves out what the role") as caught:
        template.render([{"role": role, "content": f"words of {role}"} for role in roles], True)
    assert caught.value.param == "messages"
    template.render([{"role": role, "content": " "} for role in roles], True)  # nothing is lost


def test_words_that_a_variable_lets_through_are_not_lost() -> None:
    template = ChatTemplate("{% if show %}{{ messages[0].content }}{% endif %}", {})
    assert template.render([{"role": "user", "content": "words"}], True, show=True) == "words"
    with pytest.raises(InvalidRequestError, match="leaves out"):
        template.render([{"role": "user", "content": "words"}], True)


CALLED = (
    "{% for m in messages %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}<{{ c.function.name }}>ARGUMENTS"
    "{% endfor %}{% endfor %}"
)
ARGUMENTS = {
    "written as they are": ("{{ c.function.arguments }}", '{"text": "'),
    "made JSON": ("{{ c.function.arguments | tojson }}", '"{\\"text\\": \\""'),
    "JSON where no text": (
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
        "{% endif %}",
        '{"text": "',
    ),
    "read as pairs": ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", ""),
    "read by key": ("{% for k in c.function.arguments %}{{ k }}={{ c.function.arguments[k] }};{% endfor %}", ""),
    "shown where there is no content": (
        "{% if m.content is none %}{{ c.function.arguments }}{% else %}{{ raise_exception('content') }}{% endif %}",
        '{"text": "',
    ),
    "refused unless an object": (
        "{% if c.function.arguments is not mapping %}{{ raise_exception('no object') }}{% endif %}"
        "{{ c.function.arguments | tojson }}",
        "{}",
    ),
}
ANY_TEXT = ('{"text": "', "", "[1, 2]", "5", "null", "no JSON", "{" * 5000, "[" * 100_000, '{"a": 1e999}', "\x00")


@pytest.mark.parametrize(("arguments", "shown"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_earlier_calls_may_be_any_text(arguments: str, shown: str) -> None:
    template = ChatTemplate(CALLED.replace("ARGUMENTS", arguments), {})

    def text(given: Any) -> str:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": given}}
        return template.render([{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}], True)

    assert text('{"text": "') == f"hi<f>{shown}"
    assert text('{"k": "v"}') == text({"k": "v"})
    assert "k" in text('{"k": "v"}')
    for given in ANY_TEXT:
        assert text(given).startswith("hi<f>")


# Wants user and assistant in turn, and refuses all other roles.
STRICT = (
    "{% for m in messages %}{% if m.role != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('roles') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
USED: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}},
        {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "K'}},
    ]},
    {"role": "tool", "tool_call_id": "1", "content": "dry"},
    {"role": "tool", "tool_call_id": "2", "content": "wet"},
]  # fmt: skip


@pytest.mark.parametrize("source", [STRICT, STRING, PARTS], ids=["strict", "text", "parts"])
def test_a_template_without_tools_shows_them_in_texts(source: str) -> None:
    template = ChatTemplate(source, {})
    text = template.render(USED, True, tools=[TOOL])
    described = text.index('{"type": "function", "function": {"name": "get_weather"')
    assert text.startswith("[user]You may call" if source == STRICT else "[system]You may call")
    assert described < text.index("Rain?") < text.index("[assistant]I look.\n<tool_call>\n")
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call>\n<tool_call>' in text
    results = "[tool]dry[tool]wet"
    if source == STRICT:
        results = "[user]<tool_response>\ndry\n</tool_response>\n<tool_response>\nwet\n</tool_response>"
    assert text.endswith(results)
    silent = template.render(USED, True)
    assert "You may call" not in silent
    assert "<tool_call>" in silent
    system = [{"role": "system", "content": "Be brief."}, *USED[:1]]
    if source != STRICT:
        assert template.render(system, True, tools=[TOOL]).startswith("[system]Be brief.\n\nYou may call")


@pytest.mark.parametrize("source", [templates.QWEN_TOOLS, templates.LLAMA, templates.MISTRAL])
def test_a_template_with_tools_is_left_to_itself(source: str) -> None:
    text = ChatTemplate(source, {}).render(USED, True, tools=[TOOL])
    assert "You may call" not in text
    assert "get_weather:[('city', 'Bonn')]" in text
    assert "get_weather:[]" in text
    assert "dry[1]" in text


def test_named_templates_are_found_and_tools_take_their_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D" + STRING}, {"name": "tool_use", "template": "T" + STRING}]
    listed = write_tokenizer(tmp_path / "list", chat_template=named)
    files = write_tokenizer(tmp_path / "files", template="D" + STRING, chat_template="old" + STRING)
    (files / "additional_chat_templates").mkdir()
    (files / "additional_chat_templates" / "tool_use.jinja").write_text("T" + STRING)
    (files / "additional_chat_templates" / "rag.jinja").write_text("R" + STRING)
    mixed = write_tokenizer(tmp_path / "mixed", chat_template=named)
    (mixed / "chat_template.jinja").write_text("\ufeffF" + STRING)
    single = write_tokenizer(tmp_path / "single", chat_template=named[1:])
    for folder, default, with_tools in ((listed, "D", "T"), (files, "D", "T"), (mixed, "F", "T"), (single, "T", "T")):
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.render_chat(USED[:1])[0] == default
        assert tokenizer.render_chat(USED[:1], tools=[TOOL])[0] == with_tools
    for broken in (5, ["x", 5], [{"name": "default"}], [{"name": 5, "template": "x"}], {"default": 5}):
        with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template is no text"):
            Tokenizer.load(write_tokenizer(tmp_path / "broken", chat_template=broken))


def deep(size: int) -> str:
    return "{{ " + "(" * size + "1" + ")" * size + " }}"


UNREADABLE: dict[str, tuple[bytes | None, str]] = {
    "not UTF-8": (b"\xff\xfe{{ messages }}", "chat_template.jinja: not UTF-8 at byte 0"),
    "a FIFO": (None, "chat_template.jinja: not a regular file"),
    "deep brackets": (deep(20_000).encode(), "broken: it is nested too deeply"),
    "deep loops": (b"{% for a in b %}" * 50 + b"{% endfor %}" * 50, "broken: it is nested too deeply"),
    "deep conditions": (b"{% if a %}" * 5000 + b"{% endif %}" * 5000, "broken: it is nested too deeply"),
    "no end": (b"{% if %}", "broken: line 1"),
    "an unknown filter": (b"\n{{ messages | nonsense }}", "broken: line 2"),
    "too long": (b"x" * (1 << 22) + b"xx", "chat_template.jinja: larger than"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_template_that_cannot_be_read_is_one_clear_line(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = write_tokenizer(tmp_path) / "chat_template.jinja"
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(tmp_path)
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


# Each ends in too much time, too much memory or too long a text.
HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a tower of powers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x ** 99 %}{% endfor %}",
    "doubled strings": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a repeated string": "{{ 'x' * 10 ** 11 }}",
    "nested lists": "{% set n = namespace(a=[0]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
    "compared lists": "{% set n = namespace(a=[0], b=[0]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "a tree of macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "an endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a huge join": "{{ range(99999) | join('x' * 10 ** 6) }}",
    "a wide center": "{{ 'x' | center(10 ** 11) }}",
    "a wide format": "{{ '%099999999999d' | format(1) }}",
    "a wide indent": "{{ [1] | tojson(indent=10 ** 10) }}",
    "words": "{{ lipsum(10 ** 9) }}",
    "growing replacements": "{% set s = 'x' * 10 ** 6 %}{{ s | replace('x', s) }}",
    "filled batches": "{{ [1] | batch(10 ** 10, 0) | list | length }}",
    "a long output": "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_and_the_next_rendering_is_right(hostile: str) -> None:
    condition, shown = "{% if messages[0].content == 'go' %}", "{{ messages[0].content }}"
    template = ChatTemplate(condition + hostile + "{% endif %}" + shown, {})
    begun = time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"takes too much time|refuses this"):
        template.render([{"role": "user", "content": "go"}], True)
    assert template.render([{"role": "user", "content": "stop"}], True) == "stop"
    assert time.thread_time() - begun < 1.0  # it is not computed here


def test_a_template_that_always_takes_too_much_is_refused_at_the_start() -> None:
    with pytest.raises(ModelError, match="too much time for a short conversation"):
        ChatTemplate(HOSTILE["nested ranges"], {})


def test_a_process_that_was_killed_is_replaced_and_ends_with_its_template() -> None:
    template = ChatTemplate(STRING, {})
    first = template._process._helper.process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert template.render(USED[:1], True) == "[user]Rain?"
    second = template._process._helper.process
    assert second.pid != first.pid
    os.kill(second.pid, signal.SIGPROF)  # as when its time is up
    with pytest.raises(TemplateLimitError):
        template.render(USED[:1], True)
    assert template.render(USED[:1], True) == "[user]Rain?"
    last = template._process._helper.process
    del template
    gc.collect()
    assert last.returncode is not None


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], [{"role": "user", "content": [5]}],
        ["hi"], [{"role": "assistant", "tool_calls": [{}]}], [{"role": "assistant", "tool_calls": 5}],
        [{"role": "user", "content": {1, 2}}], [{"role": "user", "content": object()}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    ],
)  # fmt: skip
def test_messages_of_another_form_are_the_users_error(messages: list[Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(STRING, {}).render(messages, True)
    assert caught.value.param == "messages"
