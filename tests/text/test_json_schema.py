"""Texts sampled at random from the masks, over a table of schemas of rising difficulty: each validates."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from helpers.grammars import json_schema, matches, sample_text, validate
from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.text.grammar import Vocabulary, compile_grammar
from minisgl.text.json_schema import LARGEST, rewritten

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
    *('{"a":' + " " * 8 + "1}", '{"é": "日 😀 \\u0001 \\n"}'),
)
NO_OBJECTS = (
    *("[]", "{'a': 1}", '{"a": 01}', '{"a": 1,}', '{"a": "\n"}', '{"a": NaN}'),
    *(' {"a": 1}', '{"a": 1} ', '{"a": 1', '{"a":' + " " * 9 + "1}"),
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


LIBRARIES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("library_schemas.json").read_text("utf-8"), parse_float=Decimal
)
EMITTED = [(library, form) for library, forms in LIBRARIES.items() for form in forms]


@pytest.mark.parametrize(("library", "form"), EMITTED, ids=str)
def test_what_libraries_emit_is_followed(library: str, form: str, vocabulary: Vocabulary, pieces: list[bytes]) -> None:
    schema = LIBRARIES[library][form]
    start = compile_grammar(json_schema(schema), vocabulary)
    for seed, free_tokens in enumerate((0, 20, 60)):
        validate(sample_text(start.copy(), pieces, seed, free_tokens), schema)


ANY: dict[str, Any] = {}
OBJECT, ARRAY, STRING = {"type": "object"}, {"type": "array"}, {"type": "string"}
NAMES = {"type": "object", "properties": {"a": True, "b": True}, "additionalProperties": False}
# A schema with keywords that say nothing, or can be said in others, and what is left of it.
REWRITTEN: tuple[tuple[Any, Any], ...] = (
    ({"uniqueItems": False}, ANY),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, {"type": "array", "maxItems": 1}),
    ({"type": "string", "uniqueItems": True, "propertyNames": {"pattern": "a"}}, STRING),
    ({"type": ["string", "null"], "contains": {"type": "null"}, "minProperties": 2}, {"type": ["string", "null"]}),
    ({"type": "string", "format": "slug"}, STRING),
    ({"type": "string", "format": "slug", "pattern": "^a"}, {"type": "string", "pattern": "^a"}),
    ({"type": "string", "format": "uuid", "pattern": "^(?=a)"}, {"type": "string", "format": "uuid"}),
    ({"type": "string", "format": "uuid", "pattern": r"^\\b"}, ...),
    ({"type": "integer", "format": "int32"}, {"type": "integer"}),
    ({"not": False}, ANY),
    ({"type": "object", "properties": {"n": {"not": {}}}}, {"type": "object", "properties": {"n": False}}),
    ({"anyOf": [{"not": True}, STRING]}, {"anyOf": [False, STRING]}),
    ({"if": {"type": "string"}}, ANY),
    ({"if": {"type": "string"}, "then": True, "else": {}}, ANY),
    ({"then": {"type": "string"}, "else": {"type": "null"}}, ANY),
    ({"type": "array", "contains": {"type": "null"}, "minContains": 0}, ARRAY),
    ({"type": "array", "minContains": 2, "maxContains": 3}, ARRAY),
    ({"type": "object", "dependentRequired": {}, "dependentSchemas": {"a": {}}}, OBJECT),
    ({"type": "object", "dependentRequired": {"a": ["b"]}, "required": ["b"]}, {"type": "object", "required": ["b"]}),
    ({"type": "object", "unevaluatedProperties": True}, OBJECT),
    ({"type": "array", "unevaluatedItems": {}}, ARRAY),
    ({"type": "object", "unevaluatedProperties": False}, {"type": "object", "additionalProperties": False}),
    ({"type": "object", "allOf": [{}], "unevaluatedProperties": False}, ...),
    ({"type": "object", "propertyNames": {"type": "string"}}, OBJECT),
    ({"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}}, NAMES),
    ({"type": "object", "propertyNames": {"const": "a"}, "properties": {"a": STRING, "b": STRING}},
     {"type": "object", "properties": {"a": STRING}, "additionalProperties": False}),
    ({"$ref": "#/$defs/d", "$defs": {"e": {"enum": ["a", "b"]}, "d": {"propertyNames": {"$ref": "#/$defs/e"}}}},
     {"$ref": "#/$defs/d", "$defs": {"e": {"enum": ["a", "b"]}, "d": {"properties": NAMES["properties"],
                                                                     "additionalProperties": False}}}),
    ({"type": "object", "propertyNames": {"pattern": "^x"}, "additionalProperties": STRING},
     {"type": "object", "patternProperties": {"^x": STRING}, "additionalProperties": False}),
    ({"type": "object", "propertyNames": {"minLength": 2}},
     {"type": "object", "patternProperties": {r"^[\s\S]{2,}$": True}, "additionalProperties": False}),
    ({"type": "object", "propertyNames": {"maxLength": 3}},
     {"type": "object", "patternProperties": {r"^[\s\S]{0,3}$": True}, "additionalProperties": False}),
    ({"type": "object", "propertyNames": {"format": "uuid"}}, ...),
    ({"type": "object", "propertyNames": {"type": "integer"}}, ...),
    *(({"propertyNames": {"enum": ["a"]}, "properties": value}, ...) for value in (["a"], 5, None)),
    *(({"propertyNames": lengths}, ...) for lengths in ({"minLength": -5}, {"minLength": "a"}, {"maxLength": [1]})),
    ({"propertyNames": {"enum": "ab"}}, ...),
    ({"type": "number", "minimum": -3.4e38, "maximum": 1e308},
     {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}),
    ({"type": "number", "minimum": 3.4e38}, ...),
    ({"type": "integer", "maximum": 10**30}, ...),
    ({"properties": {"format": {"format": "slug"}, "not": {"items": {"uniqueItems": False}}}},
     {"properties": {"format": {}, "not": {"items": {}}}}),
    ({"items": [{"format": "slug"}], "additionalItems": {"format": "slug"}}, {"items": [{}], "additionalItems": {}}),
    ({"enum": [{"format": "slug"}], "default": {"not": {}}, "examples": [{"uniqueItems": False}]}, ...),
    ({"uniqueItems": "yes", "format": 5, "minProperties": "0", "dependentRequired": 1}, ...),
    (True, ...),
)  # fmt: skip


@pytest.mark.parametrize(("schema", "left"), REWRITTEN, ids=str)
def test_what_says_nothing_is_left_out_and_the_rest_kept(schema: Any, left: Any) -> None:
    before = json.dumps(schema)
    assert rewritten(schema) == (schema if left is ... else left)
    assert (rewritten(schema) is schema) == (left is ...)
    assert json.dumps(schema) == before


# What constrains and cannot be followed, and the text that follows it loosely but not as it is written.
LOOSE: tuple[tuple[Any, str, str], ...] = (
    ({"type": "array", "uniqueItems": True}, "uniqueItems", "[1,1]"),
    ({"type": "integer", "not": {"const": 3}}, "not", "3"),
    ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if", '"a"'),
    ({"type": "array", "contains": {"type": "string"}}, "contains", "[]"),
    ({"type": "array", "prefixItems": [{}], "unevaluatedItems": False}, "unevaluatedItems", "[1,2]"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", '{"a":1}'),
    ({"type": "object", "propertyNames": {"format": "uuid"}}, "propertyNames", '{"a":1}'),
    ({"type": "object", "allOf": [{}], "unevaluatedProperties": False}, "unevaluatedProperties", '{"a":1}'),
    ({"properties": {"a": {}}, "maxProperties": 1, "type": "object"}, "maxProperties", '{"a":1,"b":1}'),
    ({"oneOf": [{"type": "integer"}, {"minimum": 1}]}, "oneOf", "5"),
    ({"type": "string", "pattern": "^(?=b)"}, "look-a", '"a"'),
    ({"patternProperties": {"(?!b)a": {"type": "null"}}, "type": "object"}, "look-a", '{"a":1}'),
)


@pytest.mark.parametrize(("schema", "said", "text"), LOOSE, ids=str)
def test_what_cannot_be_followed_is_refused_by_name_or_left_out(
    schema: Any, said: str, text: str, vocabulary: Vocabulary
) -> None:
    inner = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    kind = InvalidRequestError if said == "maxProperties" else UnsupportedParameterError
    with pytest.raises(kind, match=said):
        compile_grammar(json_schema(inner), vocabulary)
    loose = json_schema(rewritten(inner, lenient=True))
    assert matches(vocabulary, loose, f'{{"x":{text}}}')
    assert not matches(vocabulary, loose, text)
    with pytest.raises(jsonschema.ValidationError):
        validate(f'{{"x":{text}}}', inner)


def test_compact_json_has_no_white_space_between_its_parts(vocabulary: Vocabulary) -> None:
    for grammar in (Grammar(kind="json_object"), json_schema({"properties": {"a": {"type": "array"}}})):
        compact = msgspec.structs.replace(grammar, compact=True)
        for text in ('{"a":[1,{"b":" c"}],"d":{}}', "{}"):
            assert matches(vocabulary, grammar, text)
            assert matches(vocabulary, compact, text)
        for text in ('{"a": []}', '{"a":[1, 2]}', "{ }", '{"a":\n[]}'):
            assert matches(vocabulary, grammar, text)
            assert not matches(vocabulary, compact, text)
