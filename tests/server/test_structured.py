"""What of a request asks for a form of the answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.grammars import tiny_vocabulary
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import FinishReason, Grammar, Request, SamplingParams, TokenEvent
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.server.completion import ChoiceState
from minisgl.server.protocol import ChatRequest, CompletionRequest
from minisgl.server.tools import forced_call_grammar
from minisgl.text.grammar import compile_grammar
from minisgl.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
UNIQUE = {"type": "array", "uniqueItems": True}
COMPACT = Grammar(kind="json_object", compact=True)
OUTPUTS = "structured_outputs"
REGEX_A = Grammar(kind="regex", source="a")
SCHEMA_GRAMMAR = Grammar(kind="json_schema", source=json.dumps(SCHEMA, ensure_ascii=False))


def openai(**inner: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": inner}}


GOOD: tuple[tuple[dict[str, Any], Grammar | None], ...] = (
    ({}, None),
    ({"response_format": None, "guided_json": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object", "schema": None}}, Grammar(kind="json_object")),
    (openai(name="x", schema=SCHEMA), SCHEMA_GRAMMAR),
    (openai(name="x", description="d", strict=True, schema=SCHEMA), SCHEMA_GRAMMAR),
    (openai(name="x", strict=None, schema=True), Grammar(kind="json_schema", source="true")),
    ({"guided_json": SCHEMA}, SCHEMA_GRAMMAR),
    ({"guided_json": json.dumps(SCHEMA)}, Grammar(kind="json_schema", source=json.dumps(SCHEMA))),
    ({"guided_regex": "a+"}, Grammar(kind="regex", source="a+")),
    ({"guided_choice": ["ja", "né"]}, Grammar(kind="choice", source='["ja", "né"]')),
    ({"guided_grammar": 'start: "a"'}, Grammar(kind="lark", source='start: "a"')),
    ({"structured_outputs": {"json": SCHEMA}}, SCHEMA_GRAMMAR),
    ({"structured_outputs": {"regex": "a", "json": None}}, REGEX_A),
    ({"structured_outputs": {"choice": ["a"]}}, Grammar(kind="choice", source='["a"]')),
    ({"structured_outputs": {"grammar": "root ::= x"}}, Grammar(kind="lark", source="root ::= x")),
    ({"structured_outputs": {"regex": "a", "disable_fallback": False, "disable_any_whitespace": False}}, REGEX_A),
    ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_object")),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, COMPACT),
    ({"structured_outputs": {"disable_any_whitespace": True}, "response_format": {"type": "json_object"}}, COMPACT),
    ({"structured_outputs": {"disable_any_whitespace": True}, "response_format": {"type": "text"}}, None),
    (openai(name="x", strict=True, schema=UNIQUE), Grammar(kind="json_schema", source=json.dumps(UNIQUE))),
    (openai(name="x", strict=False, schema=UNIQUE), Grammar(kind="json_schema", source='{"type": "array"}')),
    (openai(name="x", strict=False, schema={"not": {}}), Grammar(kind="json_schema", source="false")),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, REGEX_A),
    ({"regex": "a"}, REGEX_A),
    ({"ebnf": 'root ::= "a"'}, Grammar(kind="lark", source='root ::= "a"')),
    ({"json_schema": SCHEMA}, SCHEMA_GRAMMAR),
    ({"regex": None, "json_schema": json.dumps(SCHEMA)}, Grammar(kind="json_schema", source=json.dumps(SCHEMA))),
)


def requested(fields: dict[str, Any]) -> tuple[Grammar | None, str | None]:
    """The grammar that a request with these fields asks for, and the field."""
    return CompletionRequest.parse(json.dumps({"prompt": "x", **fields}).encode()).requested_grammar()


@pytest.mark.parametrize(("fields", "grammar"), GOOD, ids=lambda value: str(value)[:60])
def test_fields_become_a_grammar(fields: dict[str, Any], grammar: Grammar | None) -> None:
    found, field = requested(fields)
    assert found == grammar
    assert field == (None if grammar is None else list(fields)[-1])


INNER = "response_format.json_schema"
BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, INNER),
    (openai(name="x"), f"{INNER}.schema"),
    (openai(name="x", schema=[1]), f"{INNER}.schema"),
    (openai(name="x", schema="{}"), f"{INNER}.schema"),
    (openai(name="", schema=SCHEMA), f"{INNER}.name"),
    (openai(name="x" * 65, schema=SCHEMA), f"{INNER}.name"),
    (openai(name="x", schema=SCHEMA, strict="yes"), f"{INNER}.strict"),
    (openai(name="x", schema=SCHEMA, description=1), f"{INNER}.description"),
    (openai(name="x", schema=SCHEMA, extra=1), f"{INNER}.extra"),
    ({"guided_json": 1}, "guided_json"),
    ({"guided_regex": ["a"]}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 1]}, "guided_choice.1"),
    ({"guided_choice": ["a", ""]}, "guided_choice.1"),
    ({"guided_choice": "a"}, "guided_choice"),
    ({"guided_grammar": "  "}, "guided_grammar"),
    ({"structured_outputs": []}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs"),
    ({"structured_outputs": {}, "guided_regex": "a"}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
    ({"guided_regex": "a", "regex": "a"}, "regex"),
)


UNSUPPORTED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({OUTPUTS: {"disable_additional_properties": True}}, f"{OUTPUTS}.disable_additional_properties"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
)


@pytest.mark.parametrize(("fields", "param"), BAD + UNSUPPORTED, ids=[str(i) for i in range(len(BAD + UNSUPPORTED))])
def test_what_is_malformed_or_not_supported_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        requested(fields)
    assert (caught.value.param, caught.value.status) == (param, 400)
    assert isinstance(caught.value, UnsupportedParameterError) == ((fields, param) in UNSUPPORTED)


def test_a_form_that_is_complete_before_min_tokens_loses_no_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("yes")
    params = SamplingParams(min_tokens=9)
    choice = ChoiceState(Request.make(id="x", prompt=[5], params=params), tokenizer.stream(params))
    # Nothing more is allowed: the engine ends the request in the step of its last token, without a stop token.
    events = [TokenEvent(id="x", tokens=(token,)) for token in ids]
    text = "".join(map(choice.take, [*events, TokenEvent(id="x", finish=FinishReason.STOP)]))
    assert (text, choice.finish, choice.token_ids) == ("yes", FinishReason.STOP, ids)


A_NUMBER = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
DEFINED = {"$ref": "#/$defs/x", "$defs": {"x": A_NUMBER}}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
OLDER = {"$schema": DRAFT_7, "$id": "http://x/y.json", "$ref": "#/definitions/x", "definitions": {"x": A_NUMBER}}


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
        ({"parameters": OLDER}, ['{"a": 1}'], ['"x"', "{}"]),
        ({"parameters": {"dependentRequired": {"a": ["b"]}}, "strict": False}, ['{"a": 1}'], ['"x"']),
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
        taken = all(way.accept(token) for token in vocabulary.tokens.tokenize_str(text)) and way._matcher.is_accepting()
        assert taken is (arguments in good), arguments


def test_parameters_that_are_no_object_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must be the JSON schema of an object") as caught:
        chat(parameters={"type": "string"})
    assert caught.value.param == "tools.0.function.parameters"
