"""Time structured output on this machine: compiling, then for 64 answers at once following a token and filling a mask.

All follow the same text from different tokens on. The first pass pays for what later ones find computed.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from minisgl.cli import Parser
from minisgl.core.types import Grammar
from minisgl.text.grammar import MatcherConstraint, Vocabulary, compile_grammar
from minisgl.text.tokenizer import Tokenizer
from minisgl_bench.report import table

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
CHOICES = json.dumps([f"the answer {i} of many" for i in range(1000)])
CASES = {
    "json_object": (Grammar(kind="json_object"), ANSWER),
    "json_schema": (Grammar(kind="json_schema", source=PERSON), ANSWER),
    "regex": (Grammar(kind="regex", source=r"(\w+ ){5,30}[0-9]{4}-[0-9]{2}-[0-9]{2}"), "it is " * 8 + "2026-11-21"),
    "choice of 1000": (Grammar(kind="choice", source=CHOICES), "the answer 537 of many"),
}


def time_steps(base: MatcherConstraint, mask: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Milliseconds of each step and row: float64 (tokens, BATCH)."""
    rows, places = [base.copy() for _ in range(BATCH)], [row % len(tokens) for row in range(BATCH)]
    for row, place in zip(rows, places, strict=True):
        assert all(row.accept(token) for token in tokens[:place])
    times = np.zeros((len(tokens), BATCH))
    for step in range(len(tokens)):
        for index, place in enumerate(places):
            begun = time.perf_counter()
            if place == len(tokens):
                rows[index], place = base.copy(), 0
            assert rows[index].accept(tokens[place])
            rows[index].fill(mask)
            places[index] = place + 1
            times[step, index] = 1e3 * (time.perf_counter() - begun)
    return times


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench grammar", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.load(options.tokenizer)
    begun = time.perf_counter()
    eos = tokenizer.backend.encode(tokenizer.tokens["eos_token"], add_special_tokens=False).ids
    vocabulary = Vocabulary(options.tokenizer, options.vocab_size, eos)
    title = f"{options.vocab_size} tokens, loaded in {time.perf_counter() - begun:.2f} s"
    mask, figures = np.zeros(vocabulary.num_words, np.int32), []
    for name, (grammar, text) in CASES.items():
        tokens = tokenizer.backend.encode(text, add_special_tokens=False).ids
        begun = time.perf_counter()
        base = compile_grammar(grammar, vocabulary)
        compiled = 1e3 * (time.perf_counter() - begun)
        first = time_steps(base, mask, tokens)
        later = np.concatenate([time_steps(base, mask, tokens) for _ in range(5)])
        steps = later.sum(axis=1)
        row = (compiled, 1e3 * first.mean(), 1e3 * later.mean(), steps.mean(), np.percentile(steps, 99), first.max())
        figures.append((name, *(f"{value:.2f}" for value in row)))
    columns = ("grammar", "compile ms", "first µs/row", "µs/row", "ms/step", "p99 ms", "slowest row ms")
    Console(width=100).print(table(title, columns, figures))
    return 0
