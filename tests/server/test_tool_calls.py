from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.server.callforms import HERMES, LLAMA, MISTRAL, CallForm, forced, recognise
from minisgl.server.chat_answer import message_of
from minisgl.server.parts import CallBroken, CallEnd, CallStart, Content, Part, Reasoning, merged
from minisgl.server.reading import Reading
from minisgl.server.thinking import ThinkSplitter
from minisgl.server.toolcalls import HEAD_LIMIT, ToolParser

NAMES = frozenset({"f", "get_weather"})
FORCED = forced(HERMES)
FORMS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "forced": FORCED}
PIECES = (
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", '{"name": "f", "arguments": {"a": 1}}',
    '{"name":"get_weather","parameters":{"city":"K\\u00f6ln }{ \\" ü"}}', '{"arguments": {"x": []}, "name": "f"}',
    '{"name": "unknown", "arguments": {}}', '{"name": "f"}', '{"name": "f", "arguments": {"a": ', "}", "{", "[", "]",
    ",", ";", " ", "\n", '"', "\\", "hello", "<tool", "[TOOL",
    '{"type": "function", "name": "f", "parameters": {"b": [1, {}]}}',
    '{"name": "f", "arguments": {"a": 1}, "name": "get_weather"}', '{"name": "f", "arguments": {"a": 1}, "id": "x"}',
    '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": {"a": 01}}', "<think>", "</think>", "<thi",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)


def cut(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def read(pieces: list[str], form: CallForm, limit: int | None = None) -> list[Part]:
    parser = ToolParser(form, NAMES, limit)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return merged([*parts, *parser.finish()])


def calls(parts: list[Part], form: CallForm) -> tuple[str | None, list[tuple[str, Any]]]:
    """Content, and the calls as a client reads them."""
    message = message_of(parts, Reading(form=form, names=NAMES))
    found = message.tool_calls or []
    return message.content, [(str(c.function.name), json.loads(c.function.arguments)) for c in found]


def shown(parts: list[Part]) -> str:
    """All text in the parts, whatever it was taken for."""
    return "".join(getattr(p, "rest", "") or getattr(p, "text", "") for p in parts)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(TEXTS, st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=400, deadline=None)
def test_any_split_gives_the_same_parts_as_the_whole(form: CallForm, text: str, cuts: list[int]) -> None:
    whole = read([text], form)
    assert read(cut(text, cuts), form) == whole
    assert read(list(text), form) == whole


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_calls_are_whole_and_the_rest_is_content(form: CallForm, text: str) -> None:
    parts = read([text], form)
    starts = [p for p in parts if isinstance(p, CallStart)]
    assert {start.name for start in starts} <= NAMES
    started = [start.index for start in starts]
    assert started == sorted(set(started))
    ended = [p.index for p in parts if isinstance(p, (CallEnd, CallBroken))]
    assert ended == started
    content, found = calls(parts, form)
    assert all(name in NAMES and isinstance(arguments, dict) for name, arguments in found)
    if not found:
        assert content == text


@pytest.mark.parametrize("text", [p for p in PIECES if "tool" not in p.lower()] + ["2 < 3", "x <tool y", "[1, 2]"])
@pytest.mark.parametrize("form", [HERMES, MISTRAL])
def test_text_without_a_marker_is_content(form: CallForm, text: str) -> None:
    assert calls(read(list(text), form), form) == (text, [])


CALL = {"name": "f", "arguments": {"a": [1, {"b": "}"}]}}
WANTED = [("f", CALL["arguments"])]


@pytest.mark.parametrize(
    ("form", "text", "content", "count"),
    [
        (HERMES, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", None, 1),
        (HERMES, f"Let me see.\n\n<tool_call>{json.dumps(CALL)}</tool_call>\n", "Let me see.", 1),
        (HERMES, f"<tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>{json.dumps(CALL)}</tool_call>", None, 2),
        (HERMES, f"<tool_call>{json.dumps(CALL)}</tool_call> done", "done", 1),
        (HERMES, f"<tool_call>{json.dumps(CALL)}", None, 1),
        (HERMES, f"<tool_call>{json.dumps(CALL)}\n<tool_call>{json.dumps(CALL)}", None, 2),
        (HERMES, f"<tool_call>oops <tool_call>{json.dumps(CALL)}</tool_call>", "<tool_call>oops", 1),
        (LLAMA, json.dumps({"name": "f", "parameters": CALL["arguments"]}), None, 1),
        (LLAMA, "<|python_tag|>" + json.dumps({"type": "function", "name": "f", "parameters": {"a": [1, {"b": "}"}]}}),
         None, 1),
        (LLAMA, f"{json.dumps(CALL)}; {json.dumps(CALL)}\n{json.dumps(CALL)}", None, 3),
        (LLAMA, f"Sure: {json.dumps(CALL)}", f"Sure: {json.dumps(CALL)}", 0),
        (LLAMA, '{"answer": 42} is it', '{"answer": 42} is it', 0),
        (MISTRAL, f"[TOOL_CALLS] [{json.dumps(CALL)}]", None, 1),
        (MISTRAL, f"I look.[TOOL_CALLS][{json.dumps(CALL)}, {json.dumps({**CALL, 'id': 'abcdefghi'})}]", "I look.", 2),
        (FORCED, json.dumps([CALL, CALL]), None, 2),
        (FORCED, " [ " + json.dumps(CALL, indent=2) + " ]", None, 1),
    ],
)  # fmt: skip
def test_the_forms_models_write(form: CallForm, text: str, content: str | None, count: int) -> None:
    for pieces in ([text], list(text)):
        assert calls(read(pieces, form), form) == (content, WANTED * count)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>", "<tool_call>{", '<tool_call>{"name": "f", "arguments": {"a": 1}', "<tool_call>{]</tool_call>",
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>', '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call> later', '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "<tool_call>null</tool_call>", "<tool_call>" * 5,
        '<tool_call>{"name": "f", "arguments": {"a": "\\x"}}</tool_call>', '<tool_call>{"name": "f", "arguments": {}',
        '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>', "<tool_call>{" + "[" * 3000,
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": }} \n  and more',
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3001,
    ],
)  # fmt: skip
def test_a_malformed_call_comes_back_as_it_was(text: str) -> None:
    for pieces in ([text], list(text)):
        assert calls(read(pieces, HERMES), HERMES) == (text, [])


def test_arguments_are_given_on_as_they_come_and_as_the_model_wrote_them() -> None:
    parser = ToolParser(HERMES, NAMES)
    arguments = '{"city":  "Köln", "n": [1,2]}'
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    pieces = [parser.push(character) for character in text]
    starts = next(i for i, parts in enumerate(pieces) if parts)
    assert pieces[starts][0] == CallStart(0, "f")
    texts = [getattr(part, "text", "") for parts in pieces for part in parts]
    assert "".join(texts) == arguments
    assert max(map(len, texts)) == 1


def test_long_heads_and_other_key_orders_make_calls_too() -> None:
    padded = '{"name":' + " " * HEAD_LIMIT + '"f", "arguments": {"a": 1}}'
    turned = '{"arguments": {"a": 1}, "name": "f"}'
    for text in (padded, turned):
        for pieces in ([text], list(text), cut(text, [HEAD_LIMIT - 1, HEAD_LIMIT, HEAD_LIMIT + 1])):
            assert calls(read(["<tool_call>", *pieces], HERMES), HERMES) == (None, [("f", {"a": 1})])


def test_calls_beyond_the_limit_are_dropped_and_text_is_not() -> None:
    text = f"<tool_call>{json.dumps(CALL)}</tool_call><tool_call>{json.dumps(CALL)}</tool_call>ok"
    assert calls(read(list(text), HERMES, limit=1), HERMES) == ("ok", WANTED)


@given(TEXTS, st.lists(st.integers(0, 300), max_size=10), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_split_gives_the_same_reasoning(text: str, cuts: list[int], opened: bool) -> None:
    def parts(pieces: list[str]) -> list[Part]:
        splitter = ThinkSplitter(opened)
        found = [part for piece in pieces for part in splitter.push(piece)]
        return merged([*found, *splitter.finish()])

    assert parts(cut(text, cuts)) == parts([text]) == parts(list(text))


@pytest.mark.parametrize(
    ("opened", "text", "expected"),
    [
        (False, "<think>\nhm\n</think>\n\nYes.", [Reasoning("hm"), Content("Yes.")]),
        (True, "hm\n</think>\n\nYes.", [Reasoning("hm"), Content("Yes.")]),
        (True, "<think>\nhm</think>Yes.", [Reasoning("hm"), Content("Yes.")]),
        (False, "Yes, <think> it </think>.", [Content("Yes, <think> it </think>.")]),
        (False, "<think>\n\n</think>\n\nYes.", [Content("Yes.")]),
        (False, "<think>it goes on </thi", [Reasoning("it goes on </thi")]),
        (True, "", []),
        (False, "\n x", [Content("\n x")]),
        (False, "<thinking>", [Content("<thinking>")]),
        (False, "a</think>b", [Content("a</think>b")]),
    ],
)
def test_what_was_thought_and_what_was_said(opened: bool, text: str, expected: list[Part]) -> None:
    for pieces in ([text], list(text)):
        splitter = ThinkSplitter(opened)
        parts = [part for piece in pieces for part in splitter.push(piece)]
        assert merged([*parts, *splitter.finish()]) == expected
    assert "<think>" not in shown([p for p in expected if isinstance(p, Reasoning)])


def test_a_template_shows_its_form() -> None:
    qwen = "{{ '<tool_call>\\n{\"name\": <function-name>}\\n</tool_call>' }}"
    assert recognise(qwen, True) is HERMES
    assert recognise(qwen, False) is None
    assert recognise("{{ '[TOOL_CALLS] ' }}", True) is MISTRAL
    assert recognise("{{ '<|python_tag|>' }}", True) is LLAMA
    assert recognise("{{ '\"parameters\": ' }}", True) is LLAMA
    assert recognise("<tool_call><function=f>", True) is None
    assert recognise("[TOOL_CALLS]f[ARGS]{}", True) is None
    assert recognise("{% for t in tools %}", True) is None


def test_ids_suit_the_templates_that_read_them() -> None:
    assert HERMES.new_id().startswith("call_")
    assert HERMES.new_id() != HERMES.new_id()
    assert len(MISTRAL.new_id()) == 9
    assert MISTRAL.new_id().isalnum()
    assert len(forced(MISTRAL).new_id()) == 9
