"""A grammar with reasoning before it and calls beside it: what may be said, and where it may end."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from msgspec.structs import replace

from helpers import grammars
from helpers.grammars import EOS, PADDED, allowed, choice, follow, matches, sample_text, tiny_vocabulary, token_bytes
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import Calls, Grammar
from minisgl.errors import InvalidRequestError
from minisgl.server.tools import GENERIC
from minisgl.text.grammar import Vocabulary, compile_grammar
from minisgl.text.grammar_check import GrammarChecker


def closed_object(properties: dict[str, Any], **more: Any) -> str:
    required = {"required": [*properties], "additionalProperties": False}
    return json.dumps({"type": "object", "properties": properties, **required, **more})


NUMBER = closed_object({"n": {"type": "integer"}})
BOOLEANS = {"type": "object", "additionalProperties": {"type": "boolean"}}
CALL = closed_object(
    {"name": {"const": "f"}, "arguments": {"$ref": "#/$defs/arguments0"}}, **{"$defs": {"arguments0": BOOLEANS}}
)
HERMES = Calls(schema=CALL, several=True, opening="<tool_call>", closing="</tool_call>")
LLAMA = Calls(schema=CALL.replace("arguments", "parameters"), several=True, separator=";")
ONE = '{"name": "f", "arguments": {"x": true}}'
TEXTS = {
    "json_schema": (NUMBER, '{"n": 4}'),
    "json_object": ("", '{"any": [1]}'),
    "regex": ("[a-c]+/?", "abc/"),
    "choice": ('["yes", "no"]', "no"),
    "lark": ('start: "(" start ")" | /[0-9]/', "((7))"),
}


@pytest.fixture(scope="module", params=["letters", "tokens"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """One that spells <think> and <tool_call>, and one that has a token for each, as Qwen's has."""
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "letters":
        return tiny_vocabulary(folder)
    write_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    backend.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in tokens])
    backend.save(str(folder / "tokenizer.json"))
    return Vocabulary(folder, PADDED, EOS)


@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_may_follow_reasoning_or_be_calls(kind: Any, vocabulary: Vocabulary) -> None:
    source, text = TEXTS[kind]
    grammar = Grammar(kind=kind, source=source, reasoning="possible", calls=HERMES)
    call = f"<tool_call>\n{ONE}\n</tool_call>"
    for said in (text, call, f"{call}\n<tool_call>{ONE}</tool_call>"):
        assert matches(vocabulary, grammar, said)
        assert matches(vocabulary, grammar, f"<think>\nIs it {text}? <tool_cal or </thin\n</think>\n\n{said}")
    refused = (f"{call}{text}", f"{text}{call}", f"{call}\n{text}", "", "<think></think>", f"<think>{text}", f" {text}")
    assert not [said for said in refused if matches(vocabulary, grammar, said)]


CHOICE, OBJECT = choice("yes"), Grammar(kind="json_schema", source=NUMBER)
LLAMA_CALL = ONE.replace("arguments", "parameters")
HERMES_CALL = f"<tool_call>{ONE}</tool_call>"


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (replace(CHOICE, reasoning="begun"), ["hm <thin hm</think>\nyes", "</think>yes"], ["yes", "hm</think>hm"]),
        (replace(CHOICE, calls=HERMES), ["yes", HERMES_CALL], ["<think>x</think>yes"]),
        (
            replace(OBJECT, calls=LLAMA),
            [LLAMA_CALL, f"{LLAMA_CALL}; {LLAMA_CALL};{LLAMA_CALL}", '{"n": 1}'],
            [ONE, LLAMA_CALL * 2, f"{LLAMA_CALL};", f'{LLAMA_CALL}; {{"n": 1}}'],
        ),
        (replace(OBJECT, calls=replace(HERMES, several=False)), [HERMES_CALL], [HERMES_CALL * 2]),
    ],
    ids=["reasoning begun by the prompt", "no reasoning", "calls of Llama", "one call"],
)
def test_reasoning_and_calls_come_where_they_may(
    grammar: Grammar, good: list[str], bad: list[str], vocabulary: Vocabulary
) -> None:
    assert all(matches(vocabulary, grammar, said) for said in good)
    assert not any(matches(vocabulary, grammar, said) for said in bad)


def test_a_text_without_calls_begins_none(vocabulary: Vocabulary) -> None:
    grammar = replace(GENERIC.text_without_calls(), calls=HERMES)
    good = ("", "Hello, <b>you</b>\n\n{", "a < b", HERMES_CALL, f"{HERMES_CALL}\n{HERMES_CALL}")
    bad = ("<tool_call>", f"Well: {HERMES_CALL}", f"{HERMES_CALL} so", '<tool_call>{"name": "g", "arguments": {}}')
    assert all(matches(vocabulary, grammar, said) for said in good)
    assert not any(matches(vocabulary, grammar, said) for said in bad)


def test_masks_show_both_ways(vocabulary: Vocabulary) -> None:
    pieces = token_bytes(vocabulary)
    start = follow(vocabulary, replace(OBJECT, calls=HERMES), "")
    opening = vocabulary.special_token("<tool_call>")
    assert {pieces[token][:1] for token in allowed(start) if token != opening} == ({b"{"} if opening else {b"{", b"<"})
    assert opening is None or opening in allowed(start)
    thinking = follow(vocabulary, replace(CHOICE, reasoning="begun"), "so")
    assert {token for token, piece in enumerate(pieces) if piece and piece.isascii()} <= set(allowed(thinking))
    assert not thinking._matcher.is_accepting()


def test_sampled_texts_are_json_or_calls(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(tmp_path)
    start = compile_grammar(replace(OBJECT, calls=HERMES), vocabulary)
    for seed in range(8):
        text = sample_text(start.copy(), token_bytes(vocabulary), seed, free_tokens=8)
        if text.startswith("{"):
            assert isinstance(json.loads(text)["n"], int)
        else:
            assert json.loads(text.removeprefix("<tool_call>").partition("</tool_call>")[0])["name"] == "f"


@pytest.mark.parametrize(
    ("kind", "source", "schema", "param"),
    [
        ("choice", '["yes"]', json.dumps({"type": "object", "not": {"required": ["a"]}}), "tools"),
        ("regex", "(", NUMBER, "grammar"),
    ],
)
def test_an_error_is_about_the_calls_or_the_text(
    kind: Any, source: str, schema: str, param: str, tmp_path: Path
) -> None:
    vocabulary = tiny_vocabulary(tmp_path)
    grammar = Grammar(kind=kind, source=source, calls=Calls(schema=schema, several=True))
    checker = GrammarChecker(tmp_path, PADDED, EOS)
    grammars.check(checker, CHOICE)  # known as good: the same text with calls is not
    for refuse in (partial(grammars.check, checker), lambda grammar: compile_grammar(grammar, vocabulary)):
        with pytest.raises(InvalidRequestError) as refused:
            refuse(grammar)
        assert refused.value.param == param
