"""Grammars, vocabularies to follow them with, texts sampled from them, and what a JSON schema says of a text."""

import json
import random
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import Grammar
from minisgl.text.grammar import MatcherConstraint, Vocabulary, compile_grammar
from minisgl.text.grammar_check import GrammarChecker

EOS = (1, 3)
QUOTE = re.compile(rb'(?<!\\)(?:\\\\)*"')  # a quotation mark that is not escaped
PADDED = 421  # width of the logits; the tiny tokenizer has fewer tokens, and no multiple of 32
TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
FORMATS = {  # RFC 3339 and its appendix A, RFC 1123, RFC 3986 in outline
    "time": TIME,
    "date-time": rf"\d{{4}}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[tT]{TIME}",
    "duration": r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)",
    "hostname": rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[!-~]*",
}


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def lark(source: str) -> Grammar:
    return Grammar(kind="lark", source=source)


def choice(*texts: str) -> Grammar:
    return Grammar(kind="choice", source=json.dumps(texts))


def json_schema(schema: Any) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema, default=float))


def tiny_vocabulary(folder: Path, eos: tuple[int, ...] = EOS, vocab_size: int = PADDED) -> Vocabulary:
    write_tokenizer(folder)
    return Vocabulary(folder, vocab_size, eos)


def check(checker: GrammarChecker, grammar: Grammar) -> None:
    """Raise for a grammar that cannot be followed, unless it is known."""
    if (rest := checker.checker(grammar)) is not None:
        rest()


def allowed(constraint: MatcherConstraint) -> list[int]:
    """The ids that may come next, whatever was in the mask before."""
    mask = np.full(constraint.vocabulary.num_words, 0x5A5A5A5A, np.int32)
    constraint.fill(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def token_bytes(vocabulary: Vocabulary) -> list[bytes]:
    """The bytes of each token; empty for those that have no text."""
    tokens = vocabulary.tokens
    return [b"" if tokens.is_special_token(i) else tokens.decode_bytes([i]) for i in range(vocabulary.size)]


def follow(vocabulary: Vocabulary, grammar: Grammar, text: str | bytes) -> MatcherConstraint:
    """A constraint after a text, byte by byte; fails where a byte is not allowed."""
    constraint = compile_grammar(grammar, vocabulary)
    pieces = token_bytes(vocabulary)
    for byte in text.encode() if isinstance(text, str) else text:
        assert constraint.accept(pieces.index(bytes([byte]))), f"{text!r} at {chr(byte)!r}"
    return constraint


def matches(vocabulary: Vocabulary, grammar: Grammar, text: str) -> bool:
    """Whether a text, as the tokenizer cuts it, is in a grammar's language."""
    constraint = compile_grammar(grammar, vocabulary)
    return (
        all(constraint.accept(token) for token in vocabulary.tokens.tokenize_str(text))
        and constraint._matcher.is_accepting()
    )


def sample_text(
    constraint: MatcherConstraint, pieces: Sequence[bytes], seed: int, free_tokens: int = 60, limit: int = 3000
) -> str:
    """A text sampled uniformly from the masks, that heads for its end after `free_tokens` tokens.

    Fails when a token is allowed that has no text, or that is then not accepted, or when there is no end.
    """
    rng = random.Random(seed)
    eos = set(constraint.vocabulary.eos)
    quote = pieces.index(b'"')
    outside = [pieces.index(text) for text in (b"}", b"]", b'"', b"0", b"1", b"n")]
    after_digit = [pieces.index(text) for text in (b"}", b"]", b",")]
    text = b""
    for step in range(limit):
        ids = allowed(constraint)
        assert ids, f"nothing may follow {text!r}"
        assert bool(eos & set(ids)) == constraint._matcher.is_accepting()
        inside = len(QUOTE.findall(text)) % 2
        closers = [quote] if inside else after_digit if text[-1:].isdigit() else outside
        there = [token for token in (*eos, *closers) if token in ids] if step >= free_tokens else []
        token = there[0] if there else rng.choice(ids)
        if token in eos:
            return text.decode()
        assert pieces[token], f"token {token} has no text"
        assert constraint.accept(token)
        text += pieces[token]
    raise AssertionError(f"no end after {text!r}")


def validate(text: str, schema: Any) -> None:
    """By the draft that the schema names, or the newest; with decimals, so that multipleOf is exact.

    jsonschema's own checks of formats where they are complete without further packages, plain patterns for the others.
    """
    checker = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "uuid", "email"))
    for name, pattern in FORMATS.items():

        def check(value: object, pattern: str = pattern) -> bool:
            return not isinstance(value, str) or re.fullmatch(pattern, value) is not None

        checker.checks(name)(check)
    draft = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    draft(schema, format_checker=checker).validate(json.loads(text, parse_float=Decimal))
