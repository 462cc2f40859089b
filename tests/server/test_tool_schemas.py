"""What the arguments of a forced call may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.grammars import tiny_vocabulary
from minisgl.errors import InvalidRequestError
from minisgl.grammar.matcher import compile_grammar
from minisgl.server.protocol import ChatRequest
from minisgl.server.structured import forced_call_grammar

DEFINED = {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}}


def chat(**function: Any) -> ChatRequest:
    """A request for a call of one function."""
    tool = {"type": "function", "function": {"name": "f", **function}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    return ChatRequest.parse(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        ({}, ["{}"], ['{"a": 1}', '"x"', "null"]),
        ({"parameters": None}, ["{}"], ['{"a": 1}', '"x"']),
        ({"parameters": {}}, ["{}", '{"a": 1}'], ['"x"', "[1]"]),
        ({"parameters": {"properties": {"a": {"type": "integer"}}}}, ['{"a": 1}'], ['{"a": "x"}', '"x"', "1"]),
        ({"parameters": {"type": ["object", "null"]}}, ['{"a": 1}'], ["null"]),
        ({"parameters": DEFINED}, ['{"a": 1}'], ['"x"', "{}"]),
        ({"parameters": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}}, ['{"b": 1}'], ['"x"', "{}"]),
    ],
    ids=str,
)
def test_the_arguments_are_an_object_and_none_where_none_are_declared(
    tmp_path: Path, function: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    vocabulary = tiny_vocabulary(tmp_path)
    constraint = compile_grammar(forced_call_grammar(chat(**function)), vocabulary)
    for arguments in good + bad:
        way = constraint.copy()
        text = f'[{{"name": "f", "arguments": {arguments}}}]'
        taken = all(way.accept(token) for token in vocabulary.tokens.tokenize_str(text)) and way.may_end
        assert taken is (arguments in good), arguments


def test_parameters_that_are_no_object_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must be the JSON schema of an object") as caught:
        chat(parameters={"type": "string"})
    assert caught.value.param == "tools.0.function.parameters"
