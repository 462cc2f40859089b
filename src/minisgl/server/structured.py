"""Which grammar a request asks for: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError, UnsupportedParameterError

SCHEMA_NAME_LENGTH = 64
SWITCHES = frozenset({"disable_fallback", "disable_any_whitespace", "disable_additional_properties"})
"""Options of vLLM's beside the constraint, off by default; none is supported."""


def grammar_from_request(fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar that a request asks for, None for plain text. `GrammarCompiler.check` says if it can be followed.

    `fields` are those of the request, as plain JSON values, that say what form its answer has: `response_format`,
    `structured_outputs`, `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`; None is as good as absent.
    Raises InvalidRequestError for a malformed one and when there are several; `param` names it.
    """
    asked = {name: value for name, value in fields.items() if value is not None}
    for name in asked:
        if name not in READERS:
            raise UnsupportedParameterError(f"{name} is not supported", param=name)
    found = {name: READERS[name](value, name) for name, value in asked.items()}
    grammars = {name: grammar for name, grammar in found.items() if grammar is not None}
    if len(grammars) > 1:
        names = list(grammars)
        raise InvalidRequestError(f"{' and '.join(names)} exclude each other", param=names[1])
    return next(iter(grammars.values()), None)


def field_of(fields: Mapping[str, Any]) -> str | None:
    """The field that asks for a form of the answer; there is at most one that is not about plain text."""
    return next((name for name, value in fields.items() if value != {"type": "text"}), None)


def response_format(value: Any, param: str) -> Grammar | None:
    """OpenAI's form: {"type": "text" | "json_object" | "json_schema", "json_schema": {name, schema, …}}.

    The schema is enforced as it is written, with `strict` or without.
    """
    fields = require_object(value, param)
    match fields.get("type"):
        case "text":
            refuse_others(fields, {"type"}, param)
            return None
        case "json_object":
            refuse_others(fields, {"type"}, param)
            return Grammar(kind="json_object")
        case "json_schema":
            refuse_others(fields, {"type", "json_schema"}, param)
            return openai_schema(fields.get("json_schema"), f"{param}.json_schema")
    raise InvalidRequestError(f"{param}.type must be text, json_object or json_schema", param=f"{param}.type")


def openai_schema(value: Any, param: str) -> Grammar:
    """The inner object of a `json_schema` format."""
    fields = require_object(value, param)
    refuse_others(fields, {"name", "description", "schema", "strict"}, param)
    name = fields.get("name", "answer")
    if not isinstance(name, str) or not 1 <= len(name) <= SCHEMA_NAME_LENGTH:
        rule = f"a text of 1 to {SCHEMA_NAME_LENGTH} characters"
        raise InvalidRequestError(f"{param}.name must be {rule}", param=f"{param}.name")
    for key, kind, rule in (("description", str, "a text"), ("strict", bool, "true or false")):
        if not isinstance(fields.get(key), (kind, type(None))):
            raise InvalidRequestError(f"{param}.{key} must be {rule}", param=f"{param}.{key}")
    if fields.get("schema") is None:
        raise InvalidRequestError(f"{param}.schema is required", param=f"{param}.schema")
    return schema(fields["schema"], f"{param}.schema", texts=False)


def structured_outputs(value: Any, param: str) -> Grammar | None:
    """vLLM's form: an object with one of json, regex, choice, grammar, json_object."""
    fields = require_object(value, param)
    asked = {n: item for n, item in fields.items() if item is not None and not (n in SWITCHES and item is False)}
    if switch := next((name for name in asked if name in SWITCHES), None):
        raise UnsupportedParameterError(f"{param}.{switch} is not supported", param=f"{param}.{switch}")
    if len(asked) != 1:
        raise InvalidRequestError(f"{param} must hold exactly one constraint", param=param)
    ((name, item),) = asked.items()
    where = f"{param}.{name}"
    match name:
        case "json":
            return schema(item, where)
        case "regex":
            return regex(item, where)
        case "choice":
            return choice(item, where)
        case "grammar":
            return grammar(item, where)
        case "json_object":
            if item is not True:
                raise InvalidRequestError(f"{where} must be true", param=where)
            return Grammar(kind="json_object")
    raise UnsupportedParameterError(f"{where} is not supported", param=where)


def schema(value: Any, param: str, texts: bool = True) -> Grammar:
    """A JSON schema as a value, or where `texts` are allowed as its text."""
    if texts and isinstance(value, str):
        return Grammar(kind="json_schema", source=value)
    if not isinstance(value, (dict, bool)):
        raise InvalidRequestError(f"{param} must be a JSON schema", param=param)
    try:
        return Grammar(kind="json_schema", source=json.dumps(value, ensure_ascii=False, allow_nan=False))
    except RecursionError as error:
        raise InvalidRequestError(f"{param} is nested too deeply", param=param) from error
    except ValueError as error:
        raise InvalidRequestError(f"{param} must not hold NaN or infinite numbers", param=param) from error


def regex(value: Any, param: str) -> Grammar:
    """A regular expression that the whole answer matches."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param} must be a regular expression", param=param)
    return Grammar(kind="regex", source=value)


def choice(value: Any, param: str) -> Grammar:
    """Texts, one of which is the answer."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise InvalidRequestError(f"{param} must be a list of non-empty texts", param=param)
    return Grammar(kind="choice", source=json.dumps(value, ensure_ascii=False))


def grammar(value: Any, param: str) -> Grammar:
    """Lark or GBNF."""
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(f"{param} must be a grammar in Lark's or GBNF's syntax", param=param)
    return Grammar(kind="lark", source=value)


def require_object(value: Any, param: str) -> Mapping[str, Any]:
    """The value, if it is an object."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{param} must be an object", param=param)
    return value


def refuse_others(fields: Mapping[str, Any], known: set[str], param: str) -> None:
    """Raise for the first field that has a value and is not known."""
    for name, value in fields.items():
        if name not in known and value is not None:
            raise InvalidRequestError(f"{param}.{name} is not known here", param=f"{param}.{name}")


READERS: Mapping[str, Callable[[Any, str], Grammar | None]] = {
    "response_format": response_format,
    "structured_outputs": structured_outputs,
    "guided_json": schema,
    "guided_regex": regex,
    "guided_choice": choice,
    "guided_grammar": grammar,
}
