import functools
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.core.types import FinishReason
from minisgl.server import tools
from minisgl.server.responses import ChatDelta
from minisgl.server.tools import HEAD_LIMIT, HERMES, LLAMA, MISTRAL, OutputParser, ParserConfig, Reasoning, ToolFormat

NAMES = frozenset({"f", "get_weather"})
FORCED = HERMES.forced()
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


Entry = tuple[str, int, str]
"""What a delta gives: its kind, the index of its call, and text."""


def entries(deltas: list[ChatDelta]) -> list[Entry]:
    """The deltas with neighbouring texts of one kind joined."""
    found: list[Entry] = []
    for delta in deltas:
        if delta.reasoning_content:
            found.append(("reasoning", 0, delta.reasoning_content))
        if delta.content:
            found.append(("content", 0, delta.content))
        for call in delta.tool_calls or ():
            if call.id:
                found.append(("name", int(call.index or 0), str(call.function.name)))
            if call.function.arguments:
                found.append(("arguments", int(call.index or 0), call.function.arguments))
    joined = itertools.groupby(found, key=lambda entry: entry[:2])
    return [(*key, "".join(text for *_, text in group)) for key, group in joined]


def read(
    pieces: list[str], form: ToolFormat | None, limit: int | None = None, stream: bool = True, was_cut: bool = False,
    reasoning: Reasoning | None = None,
) -> list[Entry]:  # fmt: skip
    parser = OutputParser(ParserConfig(form, NAMES, limit, reasoning), stream)
    *pieces, last = pieces or [""]
    deltas = [delta for piece in pieces for delta in parser.push(piece, None)]
    return entries([*deltas, *parser.push(last, FinishReason.LENGTH if was_cut else FinishReason.STOP)])


def whole(pieces: list[str], form: ToolFormat, limit: int | None = None) -> tuple[str | None, list[tuple[str, Any]]]:
    """Content and calls of a whole answer."""
    found = read(pieces, form, limit, stream=False)
    names = [text for kind, _, text in found if kind == "name"]
    arguments = [json.loads(text) for kind, _, text in found if kind == "arguments"]
    content = "".join(text for kind, _, text in found if kind == "content")
    return content or None if names else content, list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL, FORCED], ids=["hermes", "llama", "mistral", "forced"])
@given(TEXTS, st.lists(st.integers(0, 400), max_size=12), st.booleans(), st.sampled_from([None, "possible", "begun"]))
@settings(max_examples=250, deadline=None)
def test_any_split_gives_the_same_as_no_split(
    form: ToolFormat, stream: bool, text: str, cuts: list[int], was_cut: bool, reasoning: Reasoning | None
) -> None:
    parsed = functools.partial(read, form=form, stream=stream, was_cut=was_cut, reasoning=reasoning)
    assert parsed(cut(text, cuts)) == parsed(list(text)) == parsed([text])


@pytest.mark.parametrize("form", [HERMES, MISTRAL, LLAMA], ids=["hermes", "mistral", "llama"])
@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_calls_are_whole_and_the_rest_is_content(form: ToolFormat, text: str) -> None:
    content, found = whole([text], form)
    assert all(name in NAMES and isinstance(arguments, dict) for name, arguments in found)
    assert found or content == text
    streamed = read([text], form)
    starts = [(index, name) for kind, index, name in streamed if kind == "name"]
    assert {name for _, name in starts} <= NAMES
    assert [index for index, _ in starts] == list(range(len(starts)))
    assert len(starts) >= len(found)
    broken = [text for kind, _, text in streamed if kind == "arguments" and tools.decode_json(text) is None]
    if len(starts) == len(found) and not broken:
        assert streamed == read([text], form, stream=False)


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
def test_the_forms_models_write(form: ToolFormat, text: str, content: str | None, count: int) -> None:
    for pieces in ([text], list(text)):
        assert whole(pieces, form) == (content, WANTED * count)


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
        assert whole(pieces, HERMES) == (text, [])


def test_arguments_are_given_on_as_they_come_and_as_the_model_wrote_them() -> None:
    parser = OutputParser(ParserConfig(HERMES, NAMES), stream=True)
    arguments = '{"city":  "Köln", "n": [1,2]}'
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    deltas = [delta for character in text for delta in parser.push(character, None)]  # none of them empty
    given = [entry for delta in deltas for entry in entries([delta])]
    assert given == [("name", 0, "f"), *(("arguments", 0, character) for character in arguments)]
    assert len(given) == len(deltas)


SPOKEN = {
    "hermes": (HERMES, "Hm.\n<tool_call>\n" + json.dumps(CALL) + "\n</tool_call>"),
    "llama": (LLAMA, json.dumps(CALL).replace("arguments", "parameters")),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{json.dumps(CALL)}, {json.dumps(CALL)}]"),
    "forced": (FORCED, json.dumps([CALL, CALL])),
    "forced, indented": (FORCED, " [ " + json.dumps(CALL, indent=2) + " ]"),
}


@pytest.mark.parametrize(("form", "text"), SPOKEN.values(), ids=SPOKEN)
def test_a_call_that_is_cut_anywhere_is_the_same_whole_and_streamed(form: ToolFormat, text: str) -> None:
    """From the first character of its arguments on it is a call, and what a grammar forces is never content."""
    first = text.index("{", text.index("{") + 1)
    for size in range(len(text) + 1):
        said = text[:size]
        found = read([said], form, stream=False, was_cut=True)
        assert found == read(list(said), form, stream=True, was_cut=True)
        kinds = [kind for kind, _, _ in found]
        assert ("name" in kinds) == (size > first)
        if form.only_calls:
            assert "content" not in kinds
            assert read([said], form, stream=False) == read(list(said), form, stream=True) == found
    names, arguments = found[-2:]
    assert (names[0], names[2], json.loads(arguments[2])) == ("name", "f", CALL["arguments"])


def test_blanks_after_a_broken_call_are_content() -> None:
    call, broken = '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {"a": 1}  oops'
    found = read(list(f"<tool_call>{call}</tool_call> <tool_call>{broken}"), HERMES)
    assert found[2:] == [("name", 1, "f"), ("arguments", 1, '{"a": 1}'), ("content", 0, "  oops")]


def test_long_heads_and_other_key_orders_make_calls_too() -> None:
    padded = '{"name":' + " " * HEAD_LIMIT + '"f", "arguments": {"a": 1}}'
    turned = '{"arguments": {"a": 1}, "name": "f"}'
    for text in (padded, turned):
        for pieces in ([text], list(text), cut(text, [HEAD_LIMIT - 1, HEAD_LIMIT, HEAD_LIMIT + 1])):
            assert whole(["<tool_call>", *pieces], HERMES) == (None, [("f", {"a": 1})])


def test_calls_beyond_the_limit_are_dropped_and_text_is_not() -> None:
    text = f"<tool_call>{json.dumps(CALL)}</tool_call><tool_call>{json.dumps(CALL)}</tool_call>ok"
    assert whole(list(text), HERMES, limit=1) == ("ok", WANTED)
    broken = f"<tool_call>{json.dumps(CALL)}</tool_call>" + '<tool_call>{"name": "f", "arguments": {"a": }}'
    assert whole(list(broken), HERMES, limit=1) == ('<tool_call>{"name": "f", "arguments": {"a": }}', WANTED)


def split_reasoning(pieces: list[str], begun: bool) -> tuple[str, str]:
    found = {kind: text for kind, _, text in read(pieces, None, reasoning="begun" if begun else "possible")}
    return found.get("reasoning", ""), found.get("content", "")


@given(TEXTS, st.lists(st.integers(0, 300), max_size=10), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_split_gives_the_same_reasoning(text: str, cuts: list[int], begun: bool) -> None:
    at_once = split_reasoning([text], begun)
    assert split_reasoning(cut(text, cuts), begun) == at_once == split_reasoning(list(text), begun)


@pytest.mark.parametrize(
    ("begun", "text", "expected"),
    [
        (False, "<think>\nhm\n</think>\n\nYes.", ("hm", "Yes.")),
        (True, "hm\n</think>\n\nYes.", ("hm", "Yes.")),
        (True, "<think>\nhm</think>Yes.", ("hm", "Yes.")),
        (False, "Yes, <think> it </think>.", ("", "Yes, <think> it </think>.")),
        (False, "<think>\n\n</think>\n\nYes.", ("", "Yes.")),
        (False, "<think>it goes on </thi", ("it goes on </thi", "")),
        (True, "", ("", "")),
        (False, "\n x", ("", "\n x")),
        (False, "<thinking>", ("", "<thinking>")),
        (False, "a</think>b", ("", "a</think>b")),
    ],
)
def test_reasoning_and_content(begun: bool, text: str, expected: tuple[str, str]) -> None:
    for pieces in ([text], list(text)):
        assert split_reasoning(pieces, begun) == expected


QWEN = "{{ '<tool_call>\\n{\"name\": <function-name>}\\n</tool_call>' }}"
SHOWN = (
    (QWEN, HERMES), ("{{ '[TOOL_CALLS] ' }}", MISTRAL), ("{{ '<|python_tag|>' }}", LLAMA),
    ("{{ '\"parameters\": ' }}", LLAMA), ("<tool_call><function=f>", None), ("[TOOL_CALLS]f[ARGS]{}", None),
    ("{% for t in tools %}", None),
)  # fmt: skip


def test_a_template_shows_its_form() -> None:
    assert [tools.detect_tool_format(template, True) for template, _ in SHOWN] == [form for _, form in SHOWN]
    assert tools.detect_tool_format(QWEN, False) == tools.GENERIC


def test_ids_suit_the_templates_that_read_them() -> None:
    assert HERMES.new_id().startswith("call_")
    assert HERMES.new_id() != HERMES.new_id()
    for form in (MISTRAL, MISTRAL.forced()):
        assert re.fullmatch(r"[A-Za-z0-9]{9}", form.new_id())
