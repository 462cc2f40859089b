"""Time structured output on this machine: compiling, then for 64 answers at once following a token and filling a mask.

    minisgl bench grammar --tokenizer FOLDER --vocab-size 151936                      as the server does it
    minisgl bench grammar --tokenizer FOLDER --vocab-size 151936 --library xgrammar   if that is installed

Every answer follows the same text, each starting at another of its tokens, in one thread; a step is 64 times a token
followed and a mask filled. The first pass over a grammar pays for what later ones find computed, so it is given apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.cli import Parser
from minisgl.grammar.matcher import compile_grammar
from minisgl.grammar.vocabulary import Vocabulary, VocabularySource
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import Grammar

BATCH = 64
PERSON = """{"type": "object", "properties": {"name": {"type": "string", "maxLength": 80},
"email": {"type": "string", "format": "email"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
"tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 5},
"address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string",
"pattern": "^[0-9]{5}$"}}, "required": ["street", "zip"], "additionalProperties": false}},
"required": ["name", "email", "age", "tags", "address"], "additionalProperties": false}"""
ANSWER = """{
  "name": "Ada Lovelace, Countess of Somewhere",
  "email": "ada@example.com",
  "age": 36,
  "tags": ["red", "blue"],
  "address": {"street": "12 St James's Square, London, with a longer remark behind it", "zip": "12345"}
}"""
CASES: dict[str, tuple[Grammar, str]] = {
    "json_object": (Grammar(kind="json_object"), ANSWER),
    "json_schema": (Grammar(kind="json_schema", source=PERSON), ANSWER),
    "regex": (Grammar(kind="regex", source=r"(\w+ ){5,30}[0-9]{4}-[0-9]{2}-[0-9]{2}"), "it is " * 8 + "2026-11-21"),
    "choice of 1000": (
        Grammar(kind="choice", source=json.dumps([f"the answer {i} of many" for i in range(1000)])),
        "the answer 537 of many",
    ),
}
Follower = tuple[Callable[[int], bool], Callable[[], None]]
"""Accept a token; fill the mask."""


class LLGuidance:
    """Through the code that the server runs."""

    def __init__(self, args: argparse.Namespace, eos: tuple[int, ...]) -> None:
        source = VocabularySource(folder=str(args.tokenizer), vocab_size=args.vocab_size, eos_token_ids=eos)
        self.vocabulary = Vocabulary(source)
        self.mask = np.zeros(self.vocabulary.num_words, np.int32)

    def compile(self, grammar: Grammar) -> Any:
        return compile_grammar(grammar, self.vocabulary)

    def follow(self, compiled: Any) -> Follower:
        constraint = compiled.copy()
        return constraint.accept, partial(constraint.fill, self.mask)


class XGrammar:
    """Through xgrammar's public interface, its defaults."""

    def __init__(self, args: argparse.Namespace, eos: tuple[int, ...]) -> None:
        self.library: Any = importlib.import_module("xgrammar")
        transformers: Any = importlib.import_module("transformers")
        backend = transformers.AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
        info = self.library.TokenizerInfo.from_huggingface(
            backend, vocab_size=args.vocab_size, stop_token_ids=list(eos)
        )
        self.compiler = self.library.GrammarCompiler(info, max_threads=1)
        self.mask = self.library.allocate_token_bitmask(1, args.vocab_size)

    def compile(self, grammar: Grammar) -> Any:
        if grammar.kind == "json_object":
            return self.compiler.compile_builtin_json_grammar()
        if grammar.kind == "json_schema":
            return self.compiler.compile_json_schema(grammar.source)
        if grammar.kind == "regex":
            return self.compiler.compile_regex(grammar.source)
        texts = " | ".join(json.dumps(text) for text in json.loads(grammar.source))
        return self.compiler.compile_grammar(f"root ::= {texts}")

    def follow(self, compiled: Any) -> Follower:
        matcher = self.library.GrammarMatcher(compiled)
        return matcher.accept_token, partial(matcher.fill_next_token_bitmask, self.mask)


def time_steps(make: Callable[[], Follower], tokens: list[int]) -> tuple[list[float], float]:
    """Seconds of each step of a full batch, and of the slowest single accept and fill."""
    followers, places = [make() for _ in range(BATCH)], [row % len(tokens) for row in range(BATCH)]
    for (accept, _), place in zip(followers, places, strict=True):
        assert all(accept(token) for token in tokens[:place])
    steps, slowest = [], 0.0
    for _ in tokens:
        begun = time.perf_counter()
        for row, place in enumerate(places):
            last = time.perf_counter()
            if place == len(tokens):
                followers[row], place = make(), 0
            accept, fill = followers[row]
            assert accept(tokens[place])
            fill()
            places[row] = place + 1
            slowest = max(slowest, time.perf_counter() - last)
        steps.append(time.perf_counter() - begun)
    return steps, slowest


def main(arguments: Sequence[str]) -> int:
    """Print a line a grammar."""
    parser = Parser(prog="minisgl bench grammar", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--library", choices=("llguidance", "xgrammar"), default="llguidance")
    args = parser.parse_args(arguments)
    tokenizer = Tokenizer.load(args.tokenizer)
    begun = time.perf_counter()
    library = (LLGuidance if args.library == "llguidance" else XGrammar)(args, tokenizer.eos_token_ids)
    print(f"{args.library}, {args.vocab_size} tokens, loaded in {time.perf_counter() - begun:.2f} s")
    heads = f"{'compile ms':>11}{'first µs/row':>14}{'µs/row':>8}{'ms/step':>9}{'p99 ms':>8}{'slowest row ms':>16}"
    print(f"{'grammar':16}{heads}")
    for name, (grammar, text) in CASES.items():
        tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
        begun = time.perf_counter()
        make = partial(library.follow, library.compile(grammar))
        compiled = time.perf_counter() - begun
        first, slowest = time_steps(make, tokens)
        steps = [step for _ in range(5) for step in time_steps(make, tokens)[0]]
        mean = statistics.mean(steps)
        print(
            f"{name:16}{1e3 * compiled:11.1f}{1e6 * statistics.mean(first) / BATCH:14.1f}{1e6 * mean / BATCH:8.1f}"
            f"{1e3 * mean:9.2f}{1e3 * np.percentile(steps, 99):8.2f}{1e3 * slowest:16.1f}"
        )
    return 0
