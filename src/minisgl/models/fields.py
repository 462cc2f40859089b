"""Typed reading of the JSON objects that describe a model; whoever wrote them is not trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minisgl.errors import ModelError

MAX_COUNT = 2**31 - 1
MAX_JSON_BYTES = 256 * 2**20
_REQUIRED: Any = object()


def read_json(path: Path) -> Any:
    """The value in this JSON file. Raises ModelError naming the file when it is missing, too large or not JSON."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes, which no description of a model is")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error


class Fields:
    """A JSON object whose fields are taken with a type; `where` names it in errors.

    Every method raises ModelError naming file and field when the field is ill-typed, or missing without a default.
    A null counts as missing, except in `integer_or_null`.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ModelError(f"{where}: must be a JSON object, got {_short(values)}")
        self.values: dict[str, Any] = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, rule: str) -> ModelError:
        """The error for a field that breaks `rule`."""
        return ModelError(f"{self.where}: {name} must be {rule}, got {_short(self.values.get(name))}")

    def _take(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"{self.where}: the field {name} is missing")
            return default
        return value

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        """An integer of at least `least` that fits 31 bits."""
        value = self._take(name, default)
        if type(value) is not int or not least <= value <= MAX_COUNT:
            raise self.error(name, f"an integer of at least {least}")
        return value

    def integer_or_null(self, name: str, default: int | None) -> int | None:
        """A positive integer, or None where the file says null; `default` where it says nothing."""
        if name in self.values and self.values[name] is None:
            return None
        return None if default is None and name not in self.values else self.integer(name, default)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self._take(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, "a positive number")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """A positive finite number, or None when it is missing."""
        return self.number(name) if name in self else None

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self._take(name, default)
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._take(name, default)
        if type(value) is not str:
            raise self.error(name, "a string")
        return value

    def items(self, name: str, kind: type, default: Any = _REQUIRED) -> list[Any]:
        """A list whose elements are all of `kind`."""
        value = self._take(name, default)
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.error(name, f"a list of {kind.__name__}")
        return value

    def section(self, name: str, default: Mapping[str, Any] = _REQUIRED) -> Fields:
        """A JSON object, empty where `default` says so."""
        return Fields(self._take(name, default), f"{self.where}: {name}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
