"""Vocabularies to follow grammars with, and texts sampled from them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import Grammar
from minisgl.text.grammar import MatcherConstraint, Vocabulary, compile_grammar

EOS = (1, 3)
QUOTE = re.compile(rb'(?<!\\)(?:\\\\)*"')  # a quotation mark that is not escaped
PADDED = 421  # width of the logits; the tiny tokenizer has fewer tokens, and no multiple of 32


def tiny_vocabulary(folder: Path, eos: tuple[int, ...] = EOS, vocab_size: int = PADDED) -> Vocabulary:
    write_tokenizer(folder)
    return Vocabulary(folder, vocab_size, eos)


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
    constraint = compile_grammar(grammar, vocabulary)
    pieces = token_bytes(vocabulary)
    taken = all(constraint.accept(pieces.index(bytes([byte]))) for byte in text.encode())
    return taken and constraint.may_end


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
        assert bool(eos & set(ids)) == constraint.may_end
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
