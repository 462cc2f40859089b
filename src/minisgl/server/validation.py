"""Validation of request bodies, and the objects that bodies are made of: messages, tools, structured output."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta

from minisgl.errors import InvalidRequestError, UnsupportedParameterError

MAX_FIELDS = 1000
MAX_EXACT = 2**53
"""Up to here every integer is a double of its own."""
MAX_MESSAGES = 16384
MAX_TOOLS = 128
NULL: dict[str, Any] = {"type": "null"}

Neutral = Mapping[str, tuple[Any, ...]]
"""Fields that are known and not supported, each with the values that ask for nothing; null always does."""


def require(condition: object, message: str, param: str | None) -> None:
    """Raise InvalidRequestError unless the condition holds."""
    if not condition:
        raise InvalidRequestError(message, param=param)


def drop_unsupported(value: dict[str, Any], unsupported: Neutral, where: str = "") -> None:
    """Remove these fields; raises UnsupportedParameterError for the first that asks for something."""
    for name in [name for name in value if name in unsupported]:
        asked = value.pop(name)
        neutral = any(asked == ok and isinstance(asked, bool) == isinstance(ok, bool) for ok in unsupported[name])
        if asked is not None and not neutral:
            raise UnsupportedParameterError(f"{where}{name} is not supported", param=where + name)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; raises InvalidRequestError."""
    try:
        value = json.loads(body.decode(), parse_float=parse_number)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no encoding
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
    return value


def parse_number(text: str) -> float:
    """A number, as an integer where it is one: JSON Schema counts 3.0 as an integer, and some encoders write it so."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else number


def invalid_field(error: str) -> InvalidRequestError:
    """The error for a complaint of msgspec, with the field as the user wrote it: `messages.0.role`."""
    found = re.fullmatch(r"(.*?)(?: - at (?:`key` in )?`\$([^`]*)`)?", error, re.DOTALL)
    assert found is not None
    # Keys of maps are the user's: the error names the map.
    param = re.sub(r"\[(\d+)\]", r".\1", (found[2] or "").partition("[...]")[0]).lstrip(".")
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", found[1], re.DOTALL):
        param = ".".join(filter(None, (param, named[2])))
        if named[1] == "missing required":
            return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
        return InvalidRequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    return InvalidRequestError(f"{param}: {found[1]}", param=param or None)


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object of a request. Values keep their JSON type ("5" is no number), and an unknown field is an error."""

    unsupported: ClassVar[Neutral] = {}
    rules: ClassVar[dict[str, Any]] = {}
    """What the OpenAPI document says beside the fields."""

    @classmethod
    def parse(cls, body: bytes | dict[str, Any]) -> Self:
        """Validate a body, as bytes or as the object in them, which is changed.

        Raises InvalidRequestError or UnsupportedParameterError naming the field.
        """
        value = parse_object(body) if isinstance(body, bytes) else body
        require(len(value) <= MAX_FIELDS, f"the body has {len(value)} fields", None)
        drop_unsupported(value, cls.unsupported)
        cls.prepare(value)
        try:
            parsed = msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise invalid_field(str(error)) from error
        parsed.check()
        return parsed

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Look at the JSON object before it is converted."""

    def check(self) -> None:
        """Raise InvalidRequestError for fields that do not go together."""


NonEmpty = Annotated[str, Meta(min_length=1)]
JsonSchema = dict[str, Any] | bool
GrammarText = Annotated[str, Meta(pattern=r"\S")]
ChoiceTexts = Annotated[list[NonEmpty], Meta(min_length=1)]


class JsonSchemaFormat(Body):
    """The inner object of a `json_schema` format; the schema is enforced with `strict` or without."""

    name: Annotated[str, Meta(min_length=1, max_length=64)] = "answer"
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's structured output."""

    type: Literal["text", "json_object", "json_schema"] | None = None
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's structured output: exactly one of these."""

    unsupported = dict.fromkeys(
        ("disable_fallback", "disable_any_whitespace", "disable_additional_properties"), (False,)
    )

    json: str | JsonSchema | None = None
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class TextPart(Body):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """The function of a call; `arguments` is the text of a JSON object.

    `parsed_arguments` repeats it: OpenAI's clients add it to answers that they parse, and send it back.
    """

    name: str
    arguments: str
    parsed_arguments: Any = None


class MessageToolCall(Body, kw_only=True):
    """A call that an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """The call as chat templates take it; raises InvalidRequestError for arguments that are no JSON object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        param = f"{where}.function.arguments"
        require(isinstance(arguments, dict), "arguments must be the text of a JSON object", param)
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


GIVEN: dict[str, Any] = {"not": NULL}
NO_CALLS: dict[str, Any] = {"tool_calls": {"enum": [None, []]}, "reasoning_content": {"enum": [None, ""]}}
USER_RULE: dict[str, Any] = {"role": {"enum": ["system", "developer", "user"]}, "content": GIVEN, "tool_call_id": NULL}
TOOL_RULE: dict[str, Any] = {"role": {"const": "tool"}, "content": GIVEN, "tool_call_id": GIVEN}
ROLES: list[Any] = [
    {"properties": USER_RULE | NO_CALLS, "required": ["role", "content"]},
    {"properties": {"role": {"const": "assistant"}, "tool_call_id": NULL}, "required": ["role"]},
    {"properties": TOOL_RULE | NO_CALLS, "required": ["role", "content", "tool_call_id"]},
]
"""What `Message.for_template` asks of each role, for the OpenAPI document."""


class Message(Body):
    """A message of a conversation. `developer` is OpenAI's newer word for `system`, which templates know.

    `parsed` repeats `content`, as `parsed_arguments` does.
    """

    rules: ClassVar[dict[str, Any]] = {"oneOf": ROLES}
    unsupported = {"refusal": (), "annotations": ([],), "audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    parsed: Any = None

    @property
    def text(self) -> str:
        """The content; text parts become lines."""
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or ())

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as chat templates take it; raises InvalidRequestError for what its role cannot have."""
        assistant, tool = self.role == "assistant", self.role == "tool"
        require(assistant or self.content is not None, f"{where}.content is required", f"{where}.content")
        rule = "tool messages, and only they, name the call they answer: tool_call_id"
        require(tool == (self.tool_call_id is not None), rule, f"{where}.tool_call_id")
        for name in ("tool_calls", "reasoning_content"):
            require(assistant or not getattr(self, name), f"{name} belongs to assistant messages", f"{where}.{name}")
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        given = {name: getattr(self, name) for name in ("name", "tool_call_id", "reasoning_content")}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            calls = [call.for_template(f"{where}.tool_calls.{i}") for i, call in enumerate(self.tool_calls)]
            return {**message, "tool_calls": calls}
        return message


class ToolFunction(Body):
    """What the model is told of a tool; `parameters` is a JSON schema, without one there are no arguments."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        shown = {"name": function.name, "description": function.description or "", "parameters": parameters}
        return {"type": "function", "function": shown}


class NamedFunction(Body):
    """The name of the function to call."""

    name: str


class NamedTool(Body):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


Messages = Annotated[list[Message], Meta(max_length=MAX_MESSAGES, extra_json_schema={"minItems": 1})]
Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]


def prepare_messages(messages: Any) -> None:
    """Refuse kinds of messages that are known and not supported."""
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        where = f"messages.{index}."
        drop_unsupported(message, Message.unsupported, where)
        if message.get("role") == "function":
            raise UnsupportedParameterError(
                "the function role is not supported: use tools and the tool role", param=f"{where}role"
            )
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UnsupportedParameterError(f"content of type {kind!r} is not supported", param=f"{where}content")
