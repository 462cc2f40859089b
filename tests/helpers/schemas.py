"""JSON schemas as grammars, and whether a text is what a schema asks for."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

import jsonschema

from minisgl.core.types import Grammar

TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([zZ]|[+-]([01]\d|2[0-3]):[0-5]\d)"
LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
FORMATS = {
    "time": TIME,
    "date-time": rf"\d{{4}}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[tT]{TIME}",
    "duration": r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)",
    "hostname": rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[!-~]*",
}
"""RFC 3339 and its appendix A, RFC 1123, RFC 3986 in outline."""


def schema_grammar(schema: Any) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema, default=float))


def format_checker() -> jsonschema.FormatChecker:
    """jsonschema's own checks where they are complete without further packages, plain patterns for the others."""
    checker = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "uuid", "email"))
    for name, pattern in FORMATS.items():

        def check(value: object, pattern: str = pattern) -> bool:
            return not isinstance(value, str) or re.fullmatch(pattern, value) is not None

        checker.checks(name)(check)
    return checker


def validate(text: str, schema: Any) -> None:
    """By the draft that the schema names, or the newest; with decimals, so that multipleOf is exact."""
    value = json.loads(text, parse_float=Decimal)
    draft = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    draft(schema, format_checker=format_checker()).validate(value)
