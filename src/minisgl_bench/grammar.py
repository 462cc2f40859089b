"""Time structured output on this machine: compiling, then for 64 answers at once following a token and filling a mask.

    minisgl bench grammar --tokenizer FOLDER --vocab-size 151936

Every answer follows the same text, each starting at another of its tokens, in one thread; a step is 64 times a token
followed and a mask filled. The first pass over a grammar pays for what later ones find computed, so it is given apart.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minisgl.cli import Parser
from minisgl.core.types import Grammar
from minisgl.text.grammar import MatcherConstraint, Vocabulary, compile_grammar
from minisgl.text.tokenizer import Tokenizer

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


def time_steps(base: MatcherConstraint, mask: np.ndarray, tokens: list[int]) -> tuple[list[float], float]:
    """Seconds of each step of a full batch, and of the slowest single token and mask."""
    rows, places = [base.copy() for _ in range(BATCH)], [row % len(tokens) for row in range(BATCH)]
    for row, place in zip(rows, places, strict=True):
        assert all(row.accept(token) for token in tokens[:place])
    steps, slowest = [], 0.0
    for _ in tokens:
        begun = time.perf_counter()
        for index, place in enumerate(places):
            last = time.perf_counter()
            if place == len(tokens):
                rows[index], place = base.copy(), 0
            assert rows[index].accept(tokens[place])
            rows[index].fill(mask)
            places[index] = place + 1
            slowest = max(slowest, time.perf_counter() - last)
        steps.append(time.perf_counter() - begun)
    return steps, slowest


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench grammar", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    args = parser.parse_args(arguments)
    tokenizer = Tokenizer.load(args.tokenizer)
    begun = time.perf_counter()
    eos = tokenizer.backend.encode(tokenizer.tokens["eos_token"], add_special_tokens=False).ids
    vocabulary = Vocabulary(args.tokenizer, args.vocab_size, eos)
    mask = np.zeros(vocabulary.num_words, np.int32)
    print(f"{args.vocab_size} tokens, loaded in {time.perf_counter() - begun:.2f} s")
    heads = f"{'compile ms':>11}{'first µs/row':>14}{'µs/row':>8}{'ms/step':>9}{'p99 ms':>8}{'slowest row ms':>16}"
    print(f"{'grammar':16}{heads}")
    for name, (grammar, text) in CASES.items():
        tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
        begun = time.perf_counter()
        base = compile_grammar(grammar, vocabulary)
        compiled = time.perf_counter() - begun
        first, slowest = time_steps(base, mask, tokens)
        steps = [step for _ in range(5) for step in time_steps(base, mask, tokens)[0]]
        mean = statistics.mean(steps)
        print(
            f"{name:16}{1e3 * compiled:11.1f}{1e6 * statistics.mean(first) / BATCH:14.1f}{1e6 * mean / BATCH:8.1f}"
            f"{1e3 * mean:9.2f}{1e3 * np.percentile(steps, 99):8.2f}{1e3 * slowest:16.1f}"
        )
    return 0
