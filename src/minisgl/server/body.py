"""Request bodies: strict JSON objects whose every field is known, and errors that name the field at fault."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic_core import PydanticCustomError, core_schema

from minisgl.errors import InvalidRequestError, UnsupportedParameterError

Number = Annotated[float, Field(allow_inf_nan=False)]
EXACT = 2**53
"""Up to here each whole number is a double of its own."""
MAPS = frozenset({"logit_bias", "metadata", "chat_template_kwargs"})
"""Fields whose keys are the user's: an error names the field, not the key."""
MEMBERS = frozenset({"str", "int", "NamedTool"})
"""Members of unions, which pydantic names where fields are named; those with brackets in their name are no field."""
MANY_ERRORS = 1000
"""A body with more errors is not worth listing them."""

T = TypeVar("T")


def whole(value: object) -> object:
    """A number as an integer where it is one: to JSON Schema 3.0 is, and some encoders write no other."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT else value


Whole = BeforeValidator(whole)
"""For integers that clients may write as 3.0."""


class Body(BaseModel):
    """Values keep their JSON type ("5" is no number), and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a request's body; raises InvalidRequestError or UnsupportedParameterError naming the field."""
        try:
            value = pydantic_core.from_json(body)
        except ValueError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(value, dict):
            raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
        cls.prepare(value)
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise invalid_field(error) from error

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Look at the JSON before it is validated."""


class Neutral:
    """The type of a known field that is not supported: null, and the values that ask for nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def check(self, value: Any) -> Any:
        """Return the value; raises PydanticCustomError when it asks for something."""
        same = any(value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in self.values)
        if value is not None and not same:
            raise PydanticCustomError("unsupported", "is not supported")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self.values]}


Nothing = Annotated[Any, Neutral()]
NotTrue = Annotated[Any, Neutral(False)]
NotFalse = Annotated[Any, Neutral(True)]
"""The values that most such fields have where they ask for nothing."""


def invalid_field(error: ValidationError) -> InvalidRequestError:
    """The most exact complaint of pydantic, naming the field as the user wrote it: `messages.0.role`."""
    if error.error_count() > MANY_ERRORS:
        return InvalidRequestError(f"the body has {error.error_count()} errors")
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(complaints, key=lambda complaint: len(complaint["loc"]))
    # Between the fields, `loc` names the members of unions: "str", "constrained-str", "list[TextPart]".
    parts = [str(part) for part in first["loc"]]
    if parts and parts[0] in MAPS:
        parts = parts[:1]
    param = ".".join(part for part in parts if part not in MEMBERS and (part.isidentifier() or part.isdigit()))
    if first["type"] == "extra_forbidden":
        unknown = parts[-1]
        param = param if unknown.isidentifier() or unknown.isdigit() else ".".join(filter(None, (param, unknown)))
        return InvalidRequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    if first["type"] == "unsupported":
        return UnsupportedParameterError(f"{param} is not supported", param=param)
    if first["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
    return InvalidRequestError(f"{param}: {first['msg']}", param=param)


def is_list_of(kind: type[T], value: object) -> bool:
    """Whether `value` is a list of exactly this type (a bool is no int)."""
    return isinstance(value, list) and all(type(item) is kind for item in value)
