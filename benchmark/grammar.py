"""Time structured output on this machine: compiling, then for 64 answers at once following a token and filling a mask.

    python benchmark/grammar.py --tokenizer FOLDER --vocab-size 151936                      as the server does it
    python benchmark/grammar.py --tokenizer FOLDER --vocab-size 151936 --library xgrammar   if that is installed

Every answer follows the same text, each starting at another of its tokens, in one thread; a step is 64 times a token
followed and a mask filled. The first pass over a grammar pays for what later ones find computed, so it is given apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minisgl.core.types import Grammar
from minisgl.text.grammar import Vocabulary, VocabularySource, compile_grammar
from minisgl.text.tokenizer import Tokenizer

BATCH = 64
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 80},
        "email": {"type": "string", "format": "email"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "email", "age", "tags", "address"],
    "additionalProperties": False,
}
ANSWER = {
    "name": "Ada Lovelace, Countess of Somewhere",
    "email": "ada@example.com",
    "age": 36,
    "tags": ["red", "blue"],
    "address": {"street": "12 St James's Square, London, with a longer remark behind it", "zip": "12345"},
}
CASES: dict[str, tuple[Grammar, str]] = {
    "json_object": (Grammar(kind="json_object"), json.dumps(ANSWER, indent=2)),
    "json_schema": (Grammar(kind="json_schema", source=json.dumps(PERSON)), json.dumps(ANSWER, indent=2)),
    "regex": (Grammar(kind="regex", source=r"(\w+ ){5,30}[0-9]{4}-[0-9]{2}-[0-9]{2}"), "it is " * 8 + "2026-11-21"),
    "choice of 1000": (
        Grammar(kind="choice", source=json.dumps([f"the answer {i} of many" for i in range(1000)])),
        "the answer 537 of many",
    ),
}
Follower = tuple[Callable[[int], bool], Callable[[], None]]
"""Accept a token; fill the mask."""


def llguidance_followers(args: argparse.Namespace, eos: tuple[int, ...]) -> Callable[[Grammar], Callable[[], Follower]]:
    """Through the code that the server runs."""
    source = VocabularySource(folder=str(args.tokenizer), vocab_size=args.vocab_size, eos_token_ids=eos)
    vocabulary = Vocabulary(source)
    mask = np.zeros(vocabulary.num_words, np.int32)

    def compile_one(grammar: Grammar) -> Callable[[], Follower]:
        base = compile_grammar(grammar, vocabulary)

        def follower() -> Follower:
            constraint = base.copy()
            return constraint.accept, lambda: constraint.fill(mask)

        return follower

    return compile_one


def xgrammar_followers(args: argparse.Namespace, eos: tuple[int, ...]) -> Callable[[Grammar], Callable[[], Follower]]:
    """Through xgrammar's public interface, its defaults."""
    import xgrammar
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
    info = xgrammar.TokenizerInfo.from_huggingface(hf, vocab_size=args.vocab_size, stop_token_ids=list(eos))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    mask = xgrammar.allocate_token_bitmask(1, args.vocab_size)

    def compile_one(grammar: Grammar) -> Callable[[], Follower]:
        compiled: Any
        match grammar.kind:
            case "json_object":
                compiled = compiler.compile_builtin_json_grammar()
            case "json_schema":
                compiled = compiler.compile_json_schema(grammar.source)
            case "regex":
                compiled = compiler.compile_regex(grammar.source)
            case _:
                texts = " | ".join(json.dumps(text) for text in json.loads(grammar.source))
                compiled = compiler.compile_grammar(f"root ::= {texts}")

        def follower() -> Follower:
            matcher = xgrammar.GrammarMatcher(compiled)
            return matcher.accept_token, lambda: matcher.fill_next_token_bitmask(mask)

        return follower

    return compile_one


def time_steps(make: Callable[[], Follower], tokens: list[int]) -> tuple[list[float], float]:
    """Seconds of each step of a full batch, and of the slowest single accept and fill."""
    followers = []
    for row in range(BATCH):
        accept, fill = make()
        start = row % len(tokens)
        for token in tokens[:start]:
            assert accept(token)
        followers.append((accept, fill, start))
    steps, slowest = [], 0.0
    for step in range(len(tokens)):
        begun = time.perf_counter()
        for row, (accept, fill, start) in enumerate(followers):
            last = time.perf_counter()
            if start + step < len(tokens):
                assert accept(tokens[start + step])
                fill()
            else:
                accept, fill = make()
                assert accept(tokens[0])
                fill()
                followers[row] = (accept, fill, -step)
            slowest = max(slowest, time.perf_counter() - last)
        steps.append(time.perf_counter() - begun)
    return steps, slowest


def main() -> None:
    """Print a line a grammar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--library", choices=("llguidance", "xgrammar"), default="llguidance")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    begun = time.perf_counter()
    choose = llguidance_followers if args.library == "llguidance" else xgrammar_followers
    compile_one = choose(args, tokenizer.eos_token_ids)
    print(f"{args.library}, {args.vocab_size} tokens, loaded in {time.perf_counter() - begun:.2f} s")
    heads = f"{'compile ms':>11}{'first µs/row':>14}{'µs/row':>8}{'ms/step':>9}{'p99 ms':>8}{'slowest row ms':>16}"
    print(f"{'grammar':16}{heads}")
    for name, (grammar, text) in CASES.items():
        tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
        begun = time.perf_counter()
        make = compile_one(grammar)
        compiled = time.perf_counter() - begun
        first, first_slowest = time_steps(make, tokens)
        steps = [step for _ in range(5) for step in time_steps(make, tokens)[0]]
        mean = statistics.mean(steps)
        p99 = sorted(steps)[int(0.99 * len(steps))]
        print(
            f"{name:16}{1e3 * compiled:11.1f}{1e6 * statistics.mean(first) / BATCH:14.1f}{1e6 * mean / BATCH:8.1f}"
            f"{1e3 * mean:9.2f}{1e3 * p99:8.2f}{1e3 * first_slowest:16.1f}"
        )


if __name__ == "__main__":
    main()
