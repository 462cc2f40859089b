"""Masks against brute force, and where a text may end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from helpers.grammars import EOS, PADDED, allowed, follow, matches, tiny_vocabulary, token_bytes, walk
from helpers.tiny_tokenizers import SPECIAL_TOKENS, byte_fallback_json
from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.text.grammar import GrammarError, MatcherConstraint, Vocabulary, VocabularySource, compile_grammar, probe


def follow_last(constraint: MatcherConstraint, steps: int) -> None:
    for _ in range(steps):
        constraint.accept(allowed(constraint)[-1])


def follow_one(constraint: MatcherConstraint, token: int, steps: int) -> None:
    for _ in range(steps):
        assert token in allowed(constraint)
        assert constraint.accept(token)


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def choice(*texts: str) -> Grammar:
    return Grammar(kind="choice", source=json.dumps(texts))


LANGUAGES: tuple[tuple[Grammar, tuple[str | bytes, ...]], ...] = (
    (regex("[a-c]{1,3}"), ("", "a", "bc", "abc")),
    (regex("(the|then|there) quick"), ("", "the", "then", "the qu")),
    (regex("x*y"), ("", "x", "xxxxx", "y")),
    (regex("[^a-z]+"), ("", "1", "é", "日")),
    (regex("(.|\n)*"), ("", "any thing", "日本")),
    (regex("😀|😁|é"), ("", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xc3")),
    (choice("yes", "yesterday", "no"), ("", "y", "yes", "n", "no")),
    (Grammar(kind="lark", source='start: "(" start ")" | /[0-9]/'), ("", "(", "((1", "((1)", "7")),
    (
        Grammar(kind="json_object"),
        ("", "{", '{"a', '{"a"', '{"a": ', '{"a": 1', '{"a": "x\\', '{"a": {}', '{"a": [1, '),
    ),
)


@pytest.mark.parametrize(("grammar", "texts"), LANGUAGES, ids=lambda value: getattr(value, "source", None))
def test_a_mask_allows_exactly_the_tokens_whose_bytes_can_follow(
    grammar: Grammar, texts: tuple[str | bytes, ...], vocabulary: Vocabulary, pieces: list[bytes]
) -> None:
    single = {piece: i for i, piece in enumerate(pieces) if len(piece) == 1}
    for text in texts:
        here = follow(vocabulary, grammar, text)
        can = set()
        for token, piece in enumerate(pieces):
            trial = here.copy()
            if piece and all(trial.accept(single[bytes([byte])]) for byte in piece):
                can.add(token)
        got = set(allowed(here)) - set(EOS)
        forced = len(got) == 1 and got <= can and len({pieces[token][0] for token in can}) == 1
        assert got == can or forced, text


def test_a_choice_allows_what_begins_one_of_its_texts(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    texts = ["the quick", "the lazy", "a fox", "brown"]
    got = {pieces[token] for token in allowed(compile_grammar(choice(*texts), vocabulary))}
    assert got == {piece for piece in pieces if piece and any(text.encode().startswith(piece) for text in texts)}


@pytest.mark.parametrize("pattern", ["a", "ab*", "[ab]{2}", "(ab|cd)+", "a?b?c?", "[0-9]{2,3}x?"])
def test_walks_end_where_the_regular_expression_matches_as_python_does(
    pattern: str, vocabulary: Vocabulary, pieces: list[bytes]
) -> None:
    start = compile_grammar(regex(pattern), vocabulary)
    for seed in range(10):
        assert re.fullmatch(pattern, walk(start.copy(), pieces, seed, wander=20))


def test_every_choice_is_reached_and_nothing_else(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    texts = {"yes", "yesterday", "no", "naïve", '"quoted"', "back\\slash", "new\nline", "日本", "a/b", "\t"}
    start = compile_grammar(choice(*texts), vocabulary)
    assert {walk(start.copy(), pieces, seed) for seed in range(300)} == texts


def test_the_end_is_allowed_exactly_where_the_text_may_end(vocabulary: Vocabulary) -> None:
    grammar = regex("ab?")
    assert not set(EOS) & set(allowed(follow(vocabulary, grammar, "")))
    assert set(EOS) <= set(allowed(follow(vocabulary, grammar, "a")))
    assert set(allowed(follow(vocabulary, grammar, "ab"))) == set(EOS)


def test_after_the_end_nothing_else_comes(vocabulary: Vocabulary) -> None:
    constraint = follow(vocabulary, Grammar(kind="json_object"), '{"a": 1}')
    assert set(allowed(constraint)) == set(EOS)
    assert not constraint.copy().accept(EOS[0] + 10)
    assert constraint.accept(EOS[0])
    assert set(allowed(constraint)) == set(EOS)


def test_an_empty_text_may_be_all(vocabulary: Vocabulary) -> None:
    assert set(allowed(compile_grammar(regex(""), vocabulary))) == set(EOS)


def test_without_ids_that_end_it_a_complete_text_allows_nothing(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(tmp_path, eos=())
    assert allowed(follow(vocabulary, regex("ab?"), "ab")) == []
    assert [token_bytes(vocabulary)[token] for token in allowed(follow(vocabulary, regex("ab?"), "a"))] == [b"b"]


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_allowed(vocabulary: Vocabulary) -> None:
    anything = regex("(?s:.*)")
    got = allowed(follow(vocabulary, anything, "x"))
    special = [token for token in range(PADDED) if vocabulary.tokens.is_special_token(token)]
    assert set(range(len(SPECIAL_TOKENS))) <= set(special)
    assert set(got) & set(special) == set(EOS)
    assert vocabulary.num_words == 14
    assert max(got) < PADDED - 1


def test_a_model_narrower_than_its_tokenizer_gets_only_its_own_ids(tmp_path: Path) -> None:
    vocabulary = tiny_vocabulary(tmp_path, vocab_size=270)
    wide = tiny_vocabulary(tmp_path)
    assert vocabulary.num_words == 9
    expected = [token for token in allowed(follow(wide, regex("(?s:.*)"), "x")) if token < 270]
    assert allowed(follow(vocabulary, regex("(?s:.*)"), "x")) == expected


def test_the_text_of_a_special_token_can_still_be_written(vocabulary: Vocabulary) -> None:
    assert matches(vocabulary, choice("<|im_end|>"), "<|im_end|>")


def test_a_character_may_be_split_over_tokens_but_not_left_half(vocabulary: Vocabulary) -> None:
    grammar = regex(".")
    for length in range(1, 4):
        constraint = follow(vocabulary, grammar, "😀".encode()[:length])
        assert not constraint.may_end
        assert not set(EOS) & set(allowed(constraint))
    assert follow(vocabulary, grammar, "😀").may_end


def test_a_tokenizer_with_byte_fallback_writes_spaces_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_fallback_json(), "utf-8")
    vocabulary = Vocabulary(VocabularySource(folder=str(tmp_path), vocab_size=300, eos_token_ids=(2,)))
    pieces = token_bytes(vocabulary)
    start = compile_grammar(choice("he a", "é b"), vocabulary)
    texts = {walk(start.copy(), pieces, seed) for seed in range(30)}
    assert texts == {"he a", "é b"}


def test_where_the_text_is_forced_the_tokenizers_own_token_is(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    text = "The quick brown fox"
    constraint = compile_grammar(choice(text), vocabulary)
    tokens = []
    while (token := allowed(constraint)[0]) not in EOS:
        tokens.append(token)
        constraint.accept(token)
    assert tokens == vocabulary.tokens.tokenize_str(text)


def test_a_token_that_may_not_follow_is_refused(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    constraint = compile_grammar(regex("a+"), vocabulary)
    assert constraint.accept(pieces.index(b"a"))
    assert not constraint.accept(pieces.index(b"b"))
    assert "satisfy" in constraint.error
    with pytest.raises(GrammarError, match="satisfy"):
        allowed(constraint)


def test_copies_go_their_own_ways(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    first = compile_grammar(choice("ab", "cd"), vocabulary)
    second = first.copy()
    assert first.accept(pieces.index(b"a"))
    assert second.accept(pieces.index(b"c"))
    assert [pieces[token] for token in allowed(first)] == [b"b"]
    assert [pieces[token] for token in allowed(second)] == [b"d"]


def test_a_mask_of_the_wrong_size_is_our_own_mistake(vocabulary: Vocabulary) -> None:
    with pytest.raises(AssertionError):
        compile_grammar(regex("a"), vocabulary).fill(np.zeros(3, np.int32))


def test_a_grammar_that_becomes_too_complex_says_so(vocabulary: Vocabulary) -> None:
    grammar = Grammar(kind="lark", source="start: " + " ".join(['("a"|"b"|start)?'] * 200))
    constraint = compile_grammar(grammar, vocabulary)
    with pytest.raises(GrammarError, match="items"):
        follow_last(constraint, 50)
    with pytest.raises(InvalidRequestError, match="too expensive"):
        probe(grammar, compile_grammar(grammar, vocabulary), 32)


def test_lark_and_gbnf_are_both_understood(vocabulary: Vocabulary) -> None:
    lark = Grammar(kind="lark", source='start: "a" number // a remark with ::=\nnumber: /[0-9]+/\n')
    gbnf = Grammar(kind="lark", source='root ::= "a" number\nnumber ::= [0-9]+\n')
    for grammar in (lark, gbnf):
        assert matches(vocabulary, grammar, "a12")
        assert not matches(vocabulary, grammar, "a")


def test_what_lark_calls_by_name_is_not_read_from_files(vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidRequestError):
        compile_grammar(Grammar(kind="lark", source="%import .secret.X\nstart: X"), vocabulary)


@pytest.mark.parametrize(
    "source",
    ['start: <|im_end|> "a"', "start: <[3]>", "start: <[*]>", 'start: "x" <s> // "', 'start: a\na[stop="x"]: /.*/'],
)
def test_a_grammar_cannot_name_special_tokens_or_stops(source: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(UnsupportedParameterError, match="not supported"):
        compile_grammar(Grammar(kind="lark", source=source), vocabulary)


@pytest.mark.parametrize("source", ['start: "<|im_end|>"', "start: /<s>/", "start: /a/ // <s>", 'start: "a" # <s>'])
def test_angle_brackets_in_texts_and_remarks_are_no_special_tokens(source: str, vocabulary: Vocabulary) -> None:
    compile_grammar(Grammar(kind="lark", source=source), vocabulary)


def test_an_ambiguous_grammar_runs_out_of_time(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    constraint = compile_grammar(Grammar(kind="lark", source='start: start start | "a"'), vocabulary)
    token = pieces.index(b"a")
    with pytest.raises(GrammarError, match="s a token"):
        follow_one(constraint, token, 5000)
