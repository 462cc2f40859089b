"""Texts sampled at random from the masks, over a table of schemas of rising difficulty: each validates."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from helpers.grammars import json_schema, matches, sample_text, validate
from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError
from minisgl.text.grammar import Vocabulary, compile_grammar

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("schemas.json").read_text("utf-8"), parse_float=Decimal)
ANY_OBJECT = Grammar(kind="json_object")


@pytest.mark.parametrize("name", [*SCHEMAS, "any object"])
def test_every_text_sampled_from_the_masks_validates(name: str, vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    schema = SCHEMAS.get(name, {"type": "object"})
    jsonschema.Draft202012Validator.check_schema(json.loads(json.dumps(schema, default=float)))
    start = compile_grammar(json_schema(schema) if name in SCHEMAS else ANY_OBJECT, vocabulary)
    for seed, free_tokens in enumerate((0, 5, 20, 40, 80, 160)):
        validate(sample_text(start.copy(), pieces, seed, free_tokens), schema)


OBJECTS = (
    *('{"a": 1, "b": [true, null, {"c": "x"}]}', '{\n  "a": 1\n}'),
    *('{"a":' + " " * 64 + "1}", '{"é": "日 😀 \\u0001 \\n"}'),
)
NO_OBJECTS = (
    *("[]", "{'a': 1}", '{"a": 01}', '{"a": 1,}', '{"a": "\n"}', '{"a": NaN}'),
    *(' {"a": 1}', '{"a": 1} ', '{"a": 1', '{"a":' + " " * 65 + "1}"),
)
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}
CLOSED = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False, "type": "object"}
# A schema, none for any JSON object, with texts that it lets through and others.
INSTANCES: tuple[tuple[Any, tuple[str, ...], tuple[str, ...]], ...] = (
    (None, OBJECTS, NO_OBJECTS),
    ({"type": "integer", "minimum": 3, "maximum": 12}, ("3", "7", "12"), ("2", "13", "-3", "3.5", "03")),
    ({"type": "number", "exclusiveMinimum": 0}, ("0.5", "1", "100000"), ("0", "-1", "abc")),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ('"ab"', '"日本語"', '"a\\n"'), ('"a"', '"abcd"', "ab")),
    ({"type": "string", "pattern": "b"}, ('"abc"', '"b"'), ('"ac"', '""')),
    ({"type": "string", "format": "date"}, ('"2024-02-29"',), ('"2024-13-01"', '"2024-04-32"', '"yesterday"')),
    ({"type": "string", "format": "ipv4"}, ('"127.0.0.1"',), ('"256.0.0.1"', '"1.2.3"')),
    ({"enum": ["a", 1, None]}, ('"a"', "1", "null"), ('"b"', "2", "true")),
    (LIST, ("[1]", "[1, 2]"), ("[]", "[1,2,3]")),
    (CLOSED, ('{"a": 1}',), ("{}", '{"a": "x"}', '{"a": 1, "b": 2}', '{"a": 1, "a": 1}')),
    ({"anyOf": [{"type": "integer"}, {"const": "x"}]}, ("5", '"x"'), ('"y"', "null")),
    ({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 6}]}, ("5", "6"), ("4", "7")),
    ({"type": "integer", "multipleOf": 7}, ("0", "14", "-7", "21"), ("1", "20")),
)


@pytest.mark.parametrize(("schema", "good", "bad"), INSTANCES)
def test_a_schema_lets_valid_values_through_and_no_others(
    schema: Any, good: tuple[str, ...], bad: tuple[str, ...], vocabulary: Vocabulary
) -> None:
    grammar = ANY_OBJECT if schema is None else json_schema(schema)
    for text in good:
        validate(text, schema or {"type": "object"})
        assert matches(vocabulary, grammar, text), text
    assert not [text for text in bad if matches(vocabulary, grammar, text)]


def test_a_schema_may_name_its_draft_or_the_newest_and_no_other(vocabulary: Vocabulary) -> None:
    newest = "https://json-schema.org/schema", "http://json-schema.org/schema#"
    for draft in (*newest, "http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema"):
        grammar = json_schema({"$schema": draft, "type": "integer", "minimum": 3})
        assert matches(vocabulary, grammar, "3")
        assert not matches(vocabulary, grammar, "2")
    with pytest.raises(InvalidRequestError, match="example"):
        compile_grammar(json_schema({"$schema": "https://example.com/draft", "type": "integer"}), vocabulary)
