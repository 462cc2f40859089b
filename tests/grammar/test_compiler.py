"""What is refused at the door, in bounded time, and the process that finds out."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.grammars import EOS, PADDED, allowed
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import Grammar, ModelInfo
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.text.grammar_check import GrammarCompiler, HelperError, build_constraints

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(folder, PADDED, EOS)
    yield compiler
    compiler.close()


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", source=value if isinstance(value, str) else json.dumps(value))


def deep(opening: str, closing: str, depth: int) -> Grammar:
    return schema(opening * depth + "{}" + closing * depth)


def regex(source: str) -> Grammar:
    return Grammar(kind="regex", source=source)


def lark(source: str) -> Grammar:
    return Grammar(kind="lark", source=source)


DOUBLING = {
    f"d{i}": {"allOf": [{"properties": {x: {"$ref": f"#/$defs/d{i + 1}"} for x in xs}} for xs in ("x", "xy")]}
    for i in range(30)
}
HOSTILE: dict[str, Grammar] = {
    "refers to itself": schema({"$ref": "#"}),
    "refers in a circle": schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "circle through anyOf": schema({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}),
    "circle through allOf": schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}),
    "100 objects deep": deep('{"properties":{"a":', "}}", 100),
    "10,000 objects deep": deep('{"properties":{"a":', "}}", 10_000),
    "100,000 items deep": deep('{"items":', "}", 90_000),
    "100,000 texts": schema({"enum": [f"value number {i}" for i in range(100_000)]}),
    "10,000 optional properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}),
    "2,000 optional properties": schema({"properties": {f"p{i}": {"enum": ["a", i]} for i in range(2000)}}),
    "1,000 objects that begin alike": schema(
        {"anyOf": [{"type": "object", "properties": {"a": {}, f"b{i}": {}}} for i in range(1000)]}
    ),
    "exponential combinations": schema(
        {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(20)]}
    ),
    "exponential references": schema({"$ref": "#/$defs/d0", "$defs": {**DOUBLING, "d30": {"type": "string"}}}),
    "a large multiple": schema({"type": "integer", "multipleOf": 1_000_003}),
    "many multiples": schema({"allOf": [{"type": "integer", "multipleOf": p} for p in (2, 3, 5, 7, 11, 13, 17, 19)]}),
    "a huge range": schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
    "lengths beside a pattern": schema(
        {"type": "string", "minLength": 10_000, "maxLength": 20_000, "pattern": "^(a|b|ab)*c?$"}
    ),
    "10 MB": schema({"properties": {f"property {i}": {"description": "x" * 300} for i in range(30_000)}}),
    "a pattern of counted counts": regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "100,000 brackets": regex("(" * 100_000 + "a" + ")" * 100_000),
    "doubling terminals": lark("start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(50)) + '\nR50: "a"'),
    "optional recursion": lark("start: " + " ".join(['("a"|"b"|start)?'] * 200)),
    "intersected negations": lark("start: A\nA: ~/(.*a.{20})/ & /(.*b.{25})/ & ~/(.*c.{15}d)/"),
    "50,000 brackets": lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "too many choices": Grammar(kind="choice", source=json.dumps([str(i) for i in range(10_001)])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_ends_in_an_error(name: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.check(HOSTILE[name])
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    compiler.check(Grammar(kind="json_object"))


REFUSED: dict[str, tuple[Grammar, str]] = {
    "not": (schema({"not": {"type": "string"}}), "not"),
    "if": (schema({"if": {"type": "string"}, "then": {"minLength": 3}}), "if"),
    "contains": (schema({"type": "array", "contains": {"type": "string"}}), "contains"),
    "uniqueItems": (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "dependentRequired": (schema({"dependentRequired": {"a": ["b"]}}), "dependentRequired"),
    "propertyNames": (schema({"propertyNames": {"pattern": "^a"}}), "propertyNames"),
    "unevaluatedProperties": (schema({"unevaluatedProperties": False}), "unevaluatedProperties"),
    "unknown format": (schema({"type": "string", "format": "iri-reference"}), "iri-reference"),
    "overlapping oneOf": (schema({"oneOf": [{"minimum": 1}, {"maximum": 5}]}), "oneOf"),
    "overlapping patterns": (schema({"patternProperties": {"^a": {"type": "null"}, "b$": {}}}), "disjoint"),
    "x-guidance": (schema({"x-guidance": {"lenient": True}, "not": {}}), "x-guidance"),
    "x-guidance in Lark": (lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}'), "x-guidance"),
    "look-ahead": (regex("(?=a)b"), "look-ahead"),
    "back reference": (regex(r"(a)\1"), "backreferences"),
    "word boundary": (regex(r"\bfoo\b"), "lookarounds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(name: str, compiler: GrammarCompiler) -> None:
    grammar, said = REFUSED[name]
    with pytest.raises(UnsupportedParameterError, match=said):
        compiler.check(grammar)


INVALID: dict[str, tuple[Grammar, str]] = {
    "no JSON": (schema("{"), "not valid JSON"),
    "JSON, but no schema": (schema("[1]"), "object, true or false"),
    "no schema at all": (schema("null"), "object, true or false"),
    "NaN": (schema('{"minimum": NaN}'), "not valid JSON"),
    "a lone surrogate": (schema('{"const": "\ud800"}'), "surrogate"),
    "an unknown type": (schema({"type": "strin"}), "strin"),
    "a length as text": (schema({"type": "string", "minLength": "5"}), "minLength"),
    "a negative length": (schema({"type": "string", "minLength": -1}), "minLength"),
    "properties as a list": (schema({"properties": [1]}), "properties"),
    "false": (schema("false"), "no text matches"),
    "nothing to choose": (schema({"enum": []}), "empty"),
    "lengths that exclude each other": (schema({"type": "string", "minLength": 5, "maxLength": 3}), "greater"),
    "a missing definition": (schema({"$ref": "#/$defs/none"}), "none"),
    "a remote reference": (schema({"$ref": "http://example.com/x.json"}), "example.com"),
    "a file": (schema({"$ref": "file:///etc/passwd"}), "passwd"),
    "an open bracket": (regex("("), "unclosed"),
    "bytes that are no text": (regex(r"(?-u:\xff)"), "UTF-8"),
    "a class of nothing": (regex(r"[^\s\S]"), "no text matches"),
    "no rule to start with": (lark('a: "b"'), "start"),
    "an unknown rule": (lark("start: foo"), "foo"),
    "no choices": (Grammar(kind="choice", source="[]"), "between 1"),
    "an empty choice": (Grammar(kind="choice", source='["a", ""]'), "non-empty"),
    "a choice of numbers": (Grammar(kind="choice", source="[1]"), "list of texts"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_grammar_is_refused_with_the_reason(name: str, compiler: GrammarCompiler) -> None:
    grammar, said = INVALID[name]
    with pytest.raises(InvalidRequestError, match=said) as caught:
        compiler.check(grammar)
    assert caught.value.param in ("response_format", "guided_regex", "guided_grammar", "guided_choice")


def test_good_grammars_pass_from_many_threads_at_once(compiler: GrammarCompiler) -> None:
    failed: list[str] = []

    def check(number: int) -> None:
        good, bad = regex(f"good{number}"), regex(f"bad{number}(")
        try:
            compiler.check(good)
            compiler.check(bad)
        except InvalidRequestError as error:
            if "unclosed" not in error.message:
                failed.append(error.message)
        else:
            failed.append(f"bad{number} passed")

    threads = [threading.Thread(target=check, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def helper_pid(compiler: GrammarCompiler) -> int:
    process = compiler._guard._process
    assert process is not None
    return process.pid


def test_a_killed_helper_is_replaced(folder: Path) -> None:
    compiler = GrammarCompiler(folder, PADDED, EOS)
    compiler.check(regex("a"))
    first = helper_pid(compiler)
    os.kill(first, signal.SIGKILL)
    compiler.check(regex("b"))
    assert helper_pid(compiler) != first
    compiler.close()


def test_a_grammar_found_good_is_not_tried_again(folder: Path) -> None:
    compiler = GrammarCompiler(folder, PADDED, EOS)
    compiler.check(regex("a"))
    compiler.close()
    compiler.check(regex("a"))
    assert compiler._guard._process is None


def test_the_helper_ends_with_the_process_that_started_it(folder: Path) -> None:
    compiler = GrammarCompiler(folder, PADDED, EOS)
    compiler.check(regex("a"))
    process, control = compiler._guard._process, compiler._guard._control
    assert process is not None
    assert control is not None
    control.close()  # as its end would
    assert process.wait(timeout=60) == 0
    compiler.close()


def test_a_tokenizer_that_is_not_there_is_the_servers_fault(tmp_path: Path) -> None:
    compiler = GrammarCompiler(tmp_path, PADDED, EOS)
    with pytest.raises(HelperError, match="no tokenizer"):
        compiler.check(regex("a"))
    compiler.close()


def test_constraints_of_one_grammar_are_made_once_and_independent(folder: Path) -> None:
    model = ModelInfo(name="tiny", vocab_size=PADDED, max_seq_len=100, eos_token_ids=EOS)
    make = build_constraints(folder, model)
    first, second = make(regex("ab|cd")), make(regex("ab|cd"))
    assert first.accept(allowed(first)[0])
    assert len(allowed(first)) == 1
    assert len(allowed(second)) == 2
    with pytest.raises(InvalidRequestError):
        make(regex("("))


def test_nothing_is_loaded_before_the_first_grammar(tmp_path: Path) -> None:
    model = ModelInfo(name="none", vocab_size=PADDED, max_seq_len=100, eos_token_ids=EOS)
    build_constraints(tmp_path / "missing", model)
    GrammarCompiler(tmp_path / "missing", PADDED, EOS).close()


def test_compiled_grammars_are_forgotten_when_there_are_many(folder: Path) -> None:
    compiler = GrammarCompiler(folder, PADDED, EOS)
    for number in range(80):
        compiler.constraint(regex(f"a{number}"))
    assert len(compiler._compiled) == 32
