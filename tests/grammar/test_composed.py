"""A form with a thought before it and calls beside it: what may be said, and where it may end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from helpers.grammars import EOS, PADDED, allowed, follow, tiny_vocabulary, token_bytes, walk
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import Calls, Grammar
from minisgl.errors import InvalidRequestError
from minisgl.text.grammar import Vocabulary, VocabularySource, compile_grammar
from minisgl.text.grammar_check import GrammarCompiler

NUMBER = json.dumps(
    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
)
CALL = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"const": "f"}, "arguments": {"$ref": "#/$defs/arguments0"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "$defs": {"arguments0": {"type": "object", "additionalProperties": {"type": "boolean"}}},
    }
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


MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="module", params=["letters", "tokens"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """One that spells the marks of thoughts and calls, and one that has a token for each, as Qwen's has."""
    folder = tmp_path_factory.mktemp("tiny")
    if request.param == "letters":
        return tiny_vocabulary(folder)
    write_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    backend.save(str(folder / "tokenizer.json"))
    return Vocabulary(VocabularySource(folder=str(folder), vocab_size=PADDED, eos_token_ids=EOS))


def matches(vocabulary: Vocabulary, grammar: Grammar, text: str) -> bool:
    """Whether a text, as the tokenizer cuts it, is in a grammar's language."""
    constraint = compile_grammar(grammar, vocabulary)
    return all(constraint.accept(token) for token in vocabulary.tokens.tokenize_str(text)) and constraint.may_end


@pytest.mark.parametrize("kind", TEXTS)
def test_every_form_may_follow_a_thought_or_be_calls(kind: str, vocabulary: Vocabulary) -> None:
    source, text = TEXTS[kind]
    grammar = Grammar(kind=kind, source=source, thought="possible", calls=HERMES)  # type: ignore[arg-type]
    call = f"<tool_call>\n{ONE}\n</tool_call>"
    for said in (text, call, f"{call}\n<tool_call>{ONE}</tool_call>"):
        assert matches(vocabulary, grammar, said)
        assert matches(vocabulary, grammar, f"<think>\nIs it {text}? <tool_cal or </thin\n</think>\n\n{said}")
    for said in (
        f"{call}{text}",
        f"{text}{call}",
        f"{call}\n{text}",
        "",
        "<think></think>",
        f"<think>{text}",
        f" {text}",
    ):
        assert not matches(vocabulary, grammar, said)


def test_a_thought_that_the_prompt_began_must_end(vocabulary: Vocabulary) -> None:
    grammar = Grammar(kind="choice", source='["yes"]', thought="begun")
    assert matches(vocabulary, grammar, "hm <thin hm</think>\nyes")
    assert matches(vocabulary, grammar, "</think>yes")
    assert not matches(vocabulary, grammar, "yes")
    assert not matches(vocabulary, grammar, "hm</think>hm")


def test_without_a_thought_there_is_room_for_none(vocabulary: Vocabulary) -> None:
    grammar = Grammar(kind="choice", source='["yes"]', calls=HERMES)
    assert matches(vocabulary, grammar, "yes")
    assert not matches(vocabulary, grammar, "<think>x</think>yes")
    assert matches(vocabulary, grammar, f"<tool_call>{ONE}</tool_call>")


def test_calls_as_llama_writes_them_and_one_call_where_there_may_be_one(vocabulary: Vocabulary) -> None:
    call = ONE.replace("arguments", "parameters")
    grammar = Grammar(kind="json_schema", source=NUMBER, calls=LLAMA)
    for said in (call, f"{call}; {call};{call}", '{"n": 1}'):
        assert matches(vocabulary, grammar, said)
    for said in (ONE, f"{call}{call}", f"{call};", f'{call}; {{"n": 1}}'):
        assert not matches(vocabulary, grammar, said)
    single = Calls(schema=CALL, several=False, opening="<tool_call>", closing="</tool_call>")
    alone = Grammar(kind="json_schema", source=NUMBER, calls=single)
    assert matches(vocabulary, alone, f"<tool_call>{ONE}</tool_call>")
    assert not matches(vocabulary, alone, f"<tool_call>{ONE}</tool_call><tool_call>{ONE}</tool_call>")


def test_masks_show_both_ways(vocabulary: Vocabulary) -> None:
    pieces = token_bytes(vocabulary)
    start = follow(vocabulary, Grammar(kind="json_schema", source=NUMBER, calls=HERMES), "")
    mark = vocabulary.special_token("<tool_call>")
    assert {pieces[token][:1] for token in allowed(start) if token != mark} == ({b"{"} if mark else {b"{", b"<"})
    assert mark is None or mark in allowed(start)
    thinking = follow(vocabulary, Grammar(kind="choice", source='["yes"]', thought="begun"), "so")
    assert {token for token, piece in enumerate(pieces) if piece and piece.isascii()} <= set(allowed(thinking))
    assert not thinking.may_end


@pytest.mark.parametrize("seed", range(8))
def test_walks_end_in_a_form_or_in_calls(seed: int, tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(tmp_path)
    constraint = compile_grammar(Grammar(kind="json_schema", source=NUMBER, calls=HERMES), vocabulary)
    text = walk(constraint, token_bytes(vocabulary), seed, wander=8)
    if text.startswith("{"):
        assert isinstance(json.loads(text)["n"], int)
    else:
        first = text.removeprefix("<tool_call>").partition("</tool_call>")[0]
        assert json.loads(first)["name"] == "f"


def test_what_is_wrong_with_the_calls_is_about_the_tools(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(tmp_path)
    bad = Calls(schema=json.dumps({"type": "object", "not": {}}), several=True)
    with pytest.raises(InvalidRequestError) as refused:
        compile_grammar(Grammar(kind="choice", source='["yes"]', calls=bad), vocabulary)
    assert refused.value.param == "tools"
    good = Calls(schema=NUMBER, several=True)
    with pytest.raises(InvalidRequestError) as refused:
        compile_grammar(Grammar(kind="regex", source="(", calls=good), vocabulary)
    assert refused.value.param == "guided_regex"


def test_composed_grammars_are_checked_each_for_itself(tmp_path: Path) -> None:
    tiny_vocabulary(tmp_path)
    compiler = GrammarCompiler(tmp_path, 421, (1, 3))
    try:
        compiler.check(Grammar(kind="choice", source='["yes"]'))
        broken = Calls(schema=json.dumps({"type": "object", "not": {}}), several=True)
        with pytest.raises(InvalidRequestError) as refused:
            compiler.check(Grammar(kind="choice", source='["yes"]', calls=broken))
        assert refused.value.param == "tools"
    finally:
        compiler.close()
