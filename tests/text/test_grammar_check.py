"""What the API refuses, in bounded time, and the process that finds out."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.grammars import EOS, PADDED, allowed, check, choice, lark, regex
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.system import Helper
from minisgl.text import grammar_check
from minisgl.text.grammar_check import GrammarChecker, GrammarCompiler, HelperError

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> GrammarChecker:
    return GrammarChecker(write_tokenizer(tmp_path_factory.mktemp("tiny")), PADDED, EOS)


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", source=value if isinstance(value, str) else json.dumps(value))


def deep(opening: str, closing: str, depth: int) -> Grammar:
    return schema(opening * depth + "{}" + closing * depth)


A = "#/$defs/a"
DOUBLING = {
    f"d{i}": {"allOf": [{"properties": {x: {"$ref": f"#/$defs/d{i + 1}"} for x in xs}} for xs in ("x", "xy")]}
    for i in range(30)
}
HOSTILE: dict[str, Grammar] = {
    "refers to itself": schema({"$ref": "#"}),
    "refers in a circle": schema({"$ref": A, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": A}}}),
    "circle through anyOf": schema({"$defs": {"a": {"anyOf": [{"$ref": A}] * 2}}, "$ref": A}),
    "circle through allOf": schema({"$defs": {"a": {"allOf": [{"$ref": A}, {}]}}, "$ref": A}),
    "100 objects deep": deep('{"properties":{"a":', "}}", 100),
    "10,000 objects deep": deep('{"properties":{"a":', "}}", 10_000),
    "100,000 items deep": deep('{"items":', "}", 90_000),
    "100,000 texts": schema({"enum": [f"value number {i}" for i in range(100_000)]}),
    "10,000 optional properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}),
    "2,000 optional properties": schema({"properties": {f"p{i}": {"enum": ["a", i]} for i in range(2000)}}),
    "objects that begin alike": schema(
        {"anyOf": [{"type": "object", "properties": {"a": {}, f"b{i}": {}}} for i in range(1000)]}
    ),
    "many combinations": schema({"allOf": [{"anyOf": [{"required": [f"{x}{i}"]} for x in "ab"]} for i in range(20)]}),
    "exponential references": schema({"$ref": "#/$defs/d0", "$defs": {**DOUBLING, "d30": {"type": "string"}}}),
    "a large multiple": schema({"type": "integer", "multipleOf": 1_000_003}),
    "many multiples": schema({"allOf": [{"type": "integer", "multipleOf": p} for p in (2, 3, 5, 7, 11, 13, 17, 19)]}),
    "a huge range": schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
    "lengths": schema({"type": "string", "minLength": 10_000, "maxLength": 20_000, "pattern": "^(a|b|ab)*c?$"}),
    "10 MB": schema({"properties": {f"property {i}": {"description": "x" * 300} for i in range(30_000)}}),
    "a pattern of counted counts": regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "100,000 brackets": regex("(" * 100_000 + "a" + ")" * 100_000),
    "doubling terminals": lark("start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(50)) + '\nR50: "a"'),
    "optional recursion": lark("start: " + " ".join(['("a"|"b"|start)?'] * 200)),
    "intersected negations": lark("start: A\nA: ~/(.*a.{20})/ & /(.*b.{25})/ & ~/(.*c.{15}d)/"),
    "50,000 brackets": lark("start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "too many choices": choice(*map(str, range(10_001))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_ends_in_an_error(name: str, checker: GrammarChecker) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(checker, HOSTILE[name])
    assert caught.value.status == 400
    assert len(caught.value.message) < 400
    check(checker, Grammar(kind="json_object"))


UNSUPPORTED: dict[str, tuple[Grammar, str]] = {
    "not": (schema({"not": {"type": "string"}}), "not"),
    "overlapping patterns": (schema({"patternProperties": {"^a": {"type": "null"}, "b$": {}}}), "disjoint"),
    "x-guidance": (schema({"x-guidance": {"lenient": True}, "not": {}}), "x-guidance"),
    "x-guidance in Lark": (lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}'), "x-guidance"),
    "look-ahead": (regex("(?=a)b"), "look-ahead"),
    "back reference": (regex(r"(a)\1"), "backreferences"),
    "word boundary": (regex(r"\bfoo\b"), "lookarounds"),
}


INVALID: dict[str, tuple[Grammar, str]] = {
    "no JSON": (schema("{"), "not valid JSON"),
    "JSON, but no schema": (schema("[1]"), "object, true or false"),
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
    "no choices": (choice(), "between 1"),
    "an empty choice": (choice("a", ""), "non-empty"),
    "a choice of numbers": (Grammar(kind="choice", source="[1]"), "list of texts"),
}


@pytest.mark.parametrize("name", [*UNSUPPORTED, *INVALID])
def test_what_cannot_be_followed_is_refused_with_the_reason(name: str, checker: GrammarChecker) -> None:
    grammar, said = {**UNSUPPORTED, **INVALID}[name]
    with pytest.raises(UnsupportedParameterError if name in UNSUPPORTED else InvalidRequestError, match=said) as caught:
        check(checker, grammar)
    assert caught.value.param == "grammar"


def test_grammars_are_checked_from_many_threads_at_once(checker: GrammarChecker) -> None:
    def check_two(number: int) -> None:
        check(checker, regex(f"good{number}"))
        with pytest.raises(InvalidRequestError, match="unclosed"):
            check(checker, regex(f"bad{number}("))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(check_two, range(12)))


@pytest.fixture
def own(tmp_path: Path) -> GrammarChecker:
    """A checker whose helper may be ended."""
    return GrammarChecker(write_tokenizer(tmp_path), PADDED, EOS)


def helper(checker: GrammarChecker) -> Helper:
    assert checker._helper is not None
    return checker._helper


def test_a_helper_is_replaced_when_killed_and_ends_with_the_process_that_started_it(own: GrammarChecker) -> None:
    check(own, regex("a"))
    first = helper(own).process.pid
    os.kill(first, signal.SIGKILL)
    check(own, regex("b"))
    assert helper(own).process.pid != first
    process = helper(own).process
    helper(own).link.shutdown(socket.SHUT_RDWR)  # as the end of this process would
    assert process.wait(timeout=60) == 0
    check(own, regex("a"))  # found good: not tried again
    assert helper(own).process is process
    check(own, regex("c"))
    process = helper(own).process
    own._helper = None
    assert process.returncode is not None


def test_no_thread_ends_the_new_helper_of_another(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    check(own, regex("a"))
    first = helper(own).process.pid
    os.kill(first, signal.SIGSTOP)
    sent, go_on = threading.Semaphore(0), threading.Event()
    send_fds, read = socket.send_fds, grammar_check.read_all

    def counted_send(*args: Any) -> int:
        count = send_fds(*args)
        sent.release()
        return count

    def late_read(connection: socket.socket) -> bytes:
        try:
            return read(connection)
        finally:
            if threading.current_thread().name == "late":
                assert go_on.wait(60)

    def check_late() -> None:
        threading.current_thread().name = "late"
        check(own, regex("c"))

    monkeypatch.setattr(socket, "send_fds", counted_send)
    monkeypatch.setattr(grammar_check, "read_all", late_read)
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(check, own, regex("b"))
        late = pool.submit(check_late)
        assert all(sent.acquire(timeout=60) for _ in range(2))
        os.kill(first, signal.SIGKILL)
        early.result(60)
        second = helper(own).process
        go_on.set()
        late.result(60)
    assert helper(own).process is second
    assert second.poll() is None


def test_a_tokenizer_that_is_not_there_is_the_servers_fault(tmp_path: Path) -> None:
    checker = GrammarChecker(tmp_path, PADDED, EOS)  # loads nothing yet
    with pytest.raises(HelperError, match="no tokenizer"):
        check(checker, regex("a"))


def test_constraints_of_one_grammar_are_independent_and_only_some_are_kept(tmp_path: Path) -> None:
    own = GrammarCompiler(write_tokenizer(tmp_path), PADDED, EOS)
    first, second = own.constraint(regex("ab|cd")), own.constraint(regex("ab|cd"))
    assert own._compiled.cache_info().hits == 1
    assert first.accept(allowed(first)[0])
    assert len(allowed(first)) == 1
    assert len(allowed(second)) == 2
    with pytest.raises(InvalidRequestError):
        own.constraint(regex("("))
    for number in range(80):
        own.constraint(regex(f"a{number}"))
    assert own._compiled.cache_info().currsize == 32
