"""Which grammar a request asks for: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.types import Grammar

STRUCTURED_OUTPUTS = {
    "json": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}


def grammar_from_request(fields: Mapping[str, Any]) -> Grammar | None:
    """The grammar that these fields of a request ask for, None for plain text. Raises InvalidRequestError."""
    asked = {name: value for name, value in fields.items() if value is not None}
    if asked.get("response_format") == {"type": "text"}:
        del asked["response_format"]
    if len(asked) > 1:
        raise InvalidRequestError(f"{' and '.join(sorted(asked))} exclude each other", param=sorted(asked)[1])
    for name, value in asked.items():
        if name == "response_format":
            return from_response_format(value)
        if name == "structured_outputs":
            return from_structured_outputs(value)
        return guided(name, value, name)
    return None


def from_response_format(value: Any) -> Grammar:
    """OpenAI's form."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        return Grammar(kind="json_object")
    if kind != "json_schema":
        raise InvalidRequestError(
            "response_format.type must be text, json_object or json_schema", param="response_format.type"
        )
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), (dict, bool)):
        raise InvalidRequestError(
            "response_format.json_schema.schema is required", param="response_format.json_schema.schema"
        )
    return Grammar(kind="json_schema", source=json.dumps(inner["schema"]))


def from_structured_outputs(value: Any) -> Grammar:
    """vLLM's newer form."""
    asked = {name: item for name, item in value.items() if item is not None}
    if len(asked) != 1:
        raise InvalidRequestError("structured_outputs must hold exactly one constraint", param="structured_outputs")
    ((name, item),) = asked.items()
    where = f"structured_outputs.{name}"
    if name == "json_object":
        if item is not True:
            raise InvalidRequestError(f"{where} must be true", param=where)
        return Grammar(kind="json_object")
    if name not in STRUCTURED_OUTPUTS:
        raise UnsupportedParameterError(f"{where} is not supported", param=where)
    return guided(STRUCTURED_OUTPUTS[name], item, where)


def guided(name: str, value: Any, where: str) -> Grammar:
    """One of vLLM's older fields; `where` is what the request calls it."""
    match name, value:
        case "guided_json", str():
            return Grammar(kind="json_schema", source=value)
        case "guided_json", dict() | bool():
            return Grammar(kind="json_schema", source=json.dumps(value))
        case "guided_regex", str():
            return Grammar(kind="regex", source=value)
        case "guided_grammar", str():
            return Grammar(kind="lark", source=value)
        case "guided_choice", list() if value and all(isinstance(item, str) and item for item in value):
            return Grammar(kind="choice", source=json.dumps(value))
    raise InvalidRequestError(f"{where} has a value of the wrong kind", param=where)
