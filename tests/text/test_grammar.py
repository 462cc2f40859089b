"""Masks against brute force, and where a text may end."""

import re
from pathlib import Path

import numpy as np
import pytest

from helpers.grammars import EOS, allowed, choice, follow, lark, regex, sample_text, tiny_vocabulary, token_bytes
from helpers.tiny_tokenizers import SPECIAL_TOKENS, byte_fallback_json
from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.text.grammar import GrammarError, MatcherConstraint, Vocabulary, compile_grammar, probe

JSON = Grammar(kind="json_object")
LANGUAGES: tuple[tuple[Grammar, tuple[str | bytes, ...]], ...] = (
    (regex("[a-c]{1,3}"), ("", "a", "bc", "abc")),
    (regex("(the|then|there) quick"), ("", "the", "then", "the qu")),
    (regex("x*y"), ("", "x", "xxxxx", "y")),
    (regex("[^a-z]+"), ("", "1", "é", "日")),
    (regex("(.|\n)*"), ("", "any thing", "日本")),
    (regex("😀|😁|é"), ("", b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xc3")),
    (choice("yes", "yesterday", "no"), ("", "y", "yes", "n", "no")),
    (choice("the quick", "the lazy", "a fox", "brown"), ("", "the ")),
    (lark('start: "(" start ")" | /[0-9]/'), ("", "(", "((1", "((1)", "7")),
    (JSON, ("", "{", '{"a', '{"a"', '{"a": ', '{"a": 1', '{"a": "x\\', '{"a": {}', '{"a": [1, ')),
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


def test_texts_sampled_from_a_regular_expression_match_it(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    for pattern in ("a", "ab*", "[ab]{2}", "(ab|cd)+", "a?b?c?", "[0-9]{2,3}x?"):
        start = compile_grammar(regex(pattern), vocabulary)
        assert all(re.fullmatch(pattern, sample_text(start.copy(), pieces, seed, free_tokens=20)) for seed in range(10))


def test_every_choice_is_reached_and_nothing_else(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    texts = {"yes", "yesterday", "no", "naïve", '"quoted"', "back\\slash", "new\nline", "日本", "a/b", "\t"}
    start = compile_grammar(choice(*texts), vocabulary)
    assert {sample_text(start.copy(), pieces, seed) for seed in range(300)} == texts


@pytest.mark.parametrize(
    ("grammar", "text", "ends"),
    [
        (regex("ab?"), "", "no"),
        (regex("ab?"), "a", "may"),
        (regex("ab?"), "ab", "must"),
        (regex(""), "", "must"),
        *((regex("."), "😀".encode()[:size], "no") for size in (1, 3)),
        (regex("."), "😀", "must"),
        (JSON, '{"a": 1}', "must"),
    ],
)
def test_the_end_is_allowed_exactly_where_the_text_may_end(
    grammar: Grammar, text: str | bytes, ends: str, vocabulary: Vocabulary
) -> None:
    constraint = follow(vocabulary, grammar, text)
    got = set(allowed(constraint))
    assert constraint._matcher.is_accepting() == (ends != "no")
    assert set(EOS) & got == (set() if ends == "no" else set(EOS))
    assert (got == set(EOS)) == (ends == "must")
    if ends == "must":
        assert not constraint.copy().accept(EOS[0] + 10)
        assert constraint.accept(EOS[0])
        assert set(allowed(constraint)) == set(EOS)


def test_only_ids_that_the_model_has_and_that_have_a_text_are_allowed(vocabulary: Vocabulary, tmp_path: Path) -> None:
    anything = regex("(?s:.*)")
    got = allowed(follow(vocabulary, anything, "x"))
    special = {token for token in range(vocabulary.size) if vocabulary.tokens.is_special_token(token)}
    assert set(range(len(SPECIAL_TOKENS))) <= special
    assert set(got) & special == set(EOS)
    assert vocabulary.num_words == 14
    assert max(got) < vocabulary.size - 1
    narrow = tiny_vocabulary(tmp_path, vocab_size=270)
    assert narrow.num_words == 9
    assert allowed(follow(narrow, anything, "x")) == [token for token in got if token < 270]
    endless = tiny_vocabulary(tmp_path, eos=())
    assert allowed(follow(endless, regex("ab?"), "ab")) == []
    assert [token_bytes(endless)[token] for token in allowed(follow(endless, regex("ab?"), "a"))] == [b"b"]


def test_a_tokenizer_with_byte_fallback_writes_spaces_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_fallback_json(), "utf-8")
    vocabulary = Vocabulary(tmp_path, 300, (2,))
    start, pieces = compile_grammar(choice("he a", "é b"), vocabulary), token_bytes(vocabulary)
    assert {sample_text(start.copy(), pieces, seed) for seed in range(30)} == {"he a", "é b"}


def test_where_the_text_is_forced_the_tokenizers_own_token_is(vocabulary: Vocabulary) -> None:
    text = "The quick brown fox"
    constraint, tokens = compile_grammar(choice(text), vocabulary), []
    while (token := allowed(constraint)[0]) not in EOS:
        tokens.append(token)
        constraint.accept(token)
    assert tokens == vocabulary.tokens.tokenize_str(text)


def test_a_token_that_may_not_follow_is_refused(vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    constraint = follow(vocabulary, regex("a+"), "a")
    with pytest.raises(AssertionError):
        constraint.fill(np.zeros(3, np.int32))  # a mask of the wrong size
    assert not constraint.accept(pieces.index(b"b"))
    assert "satisfy" in constraint.error
    with pytest.raises(GrammarError, match="satisfy"):
        allowed(constraint)


COMPLEX = "start: " + " ".join(['("a"|"b"|start)?'] * 200)


def follow_last(constraint: MatcherConstraint, steps: int) -> None:
    for _ in range(steps):
        constraint.accept(allowed(constraint)[-1])


def test_a_grammar_that_costs_too_much_on_the_way_says_so(vocabulary: Vocabulary) -> None:
    constraint = compile_grammar(lark(COMPLEX), vocabulary)
    with pytest.raises(GrammarError, match="items"):
        follow_last(constraint, 5000)
    with pytest.raises(InvalidRequestError, match="too expensive"):
        probe(lark(COMPLEX), compile_grammar(lark(COMPLEX), vocabulary), 32)


def test_a_constraint_says_what_its_last_token_took(vocabulary: Vocabulary) -> None:
    constraint = compile_grammar(lark('start: start start | "a"'), vocabulary)
    allowed(constraint)
    before = constraint.seconds
    follow_last(constraint, 300)
    assert constraint.seconds > before > 0


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (lark('start: "a" number // a remark with ::=\nnumber: /[0-9]+/\n'), "a12"),
        (lark('root ::= "a" number\nnumber ::= [0-9]+\n'), "a12"),  # GBNF
        *((own, "<|im_end|>") for own in (choice("<|im_end|>"), lark('start: "<|im_end|>"'), regex(r"<\|im_end\|>"))),
        (lark("start: /<s>/"), "<s>"),  # not as the special token
        (Grammar(kind="json_schema", source='{"const": "a<s>"}'), '"a<s>"'),
        *((lark(source), "ab") for source in ("start: /ab/ // <s>", 'start: "ab" # <s>')),
    ],
)
def test_a_grammar_takes_its_text_and_not_a_part_of_it(grammar: Grammar, text: str, vocabulary: Vocabulary) -> None:
    for said in (text, sample_text(compile_grammar(grammar, vocabulary), token_bytes(vocabulary), seed=0)):
        assert follow(vocabulary, grammar, said)._matcher.is_accepting()
    assert not follow(vocabulary, grammar, text[:1])._matcher.is_accepting()


def test_a_grammar_cannot_name_special_tokens_stops_or_files(vocabulary: Vocabulary) -> None:
    special = ('start: <|im_end|> "a"', "start: <[3]>", "start: <[*]>", 'start: "x" <s> // "')
    for source in (*special, 'start: a\na[stop="x"]: /.*/'):
        with pytest.raises(UnsupportedParameterError, match="not supported"):
            compile_grammar(lark(source), vocabulary)
    with pytest.raises(InvalidRequestError):
        compile_grammar(lark("%import .secret.X\nstart: X"), vocabulary)
