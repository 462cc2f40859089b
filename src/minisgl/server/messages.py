"""Messages and tools as a conversation holds them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.server.body import Body, Neutral, Nothing

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")]


class TextPart(Body):
    """A piece of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class CalledFunction(Body):
    """The function of a call; `arguments` is the text of a JSON object.

    `parsed_arguments` says the same again: OpenAI's clients add it to answers that they parse, and send it back.
    """

    name: str
    arguments: str
    parsed_arguments: Any = None


class ToolCall(Body):
    """A call that an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


GIVEN: dict[str, Any] = {"not": {"type": "null"}}
ABSENT: dict[str, Any] = {"type": "null"}
NO_CALLS: dict[str, Any] = {"tool_calls": {"enum": [None, []]}, "reasoning_content": {"enum": [None, ""]}}
ROLES: list[Any] = [
    {
        "properties": {"role": {"enum": ["system", "developer", "user"]}, "content": GIVEN, "tool_call_id": ABSENT}
        | NO_CALLS,
        "required": ["role", "content"],
    },
    {"properties": {"role": {"const": "assistant"}, "tool_call_id": ABSENT}, "required": ["role"]},
    {
        "properties": {"role": {"const": "tool"}, "content": GIVEN, "tool_call_id": GIVEN} | NO_CALLS,
        "required": ["role", "content", "tool_call_id"],
    },
]
"""What `Message.check` asks of each role, for the document."""


class Message(Body):
    """One turn of a conversation. `developer` is OpenAI's newer word for `system`, the one templates know.

    `parsed` says again what `content` says, as `parsed_arguments` does.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": ROLES})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    parsed: Any = None
    refusal: Nothing = None
    annotations: Annotated[Any, Neutral([])] = None
    audio: Nothing = None
    function_call: Nothing = None

    @property
    def text(self) -> str:
        """The content; text parts become lines."""
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or ())

    def check(self, where: str) -> None:
        """Raise InvalidRequestError when it holds what its role does not have, or lacks what it must have."""
        if self.content is None and self.role != "assistant":
            raise InvalidRequestError(f"{where}.content is required", param=f"{where}.content")
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidRequestError(
                f"{where}.tool_call_id is required: which call this answers", param=f"{where}.tool_call_id"
            )
        if self.role != "tool" and self.tool_call_id is not None:
            raise InvalidRequestError("tool_call_id belongs to tool messages", param=f"{where}.tool_call_id")
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning_content"):
                if getattr(self, name):
                    raise InvalidRequestError(f"{name} belongs to assistant messages", param=f"{where}.{name}")

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as chat templates take it; raises InvalidRequestError for arguments that are no JSON object."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": self._function(call, f"{where}.tool_calls.{i}")}
                for i, call in enumerate(self.tool_calls)
            ]
        return message

    @staticmethod
    def _function(call: ToolCall, where: str) -> dict[str, Any]:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                "arguments must be the text of a JSON object", param=f"{where}.function.arguments"
            )
        return {"name": call.function.name, "arguments": arguments}


def of_object(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a function's arguments, unless it is plainly one of something else than an object."""
    if isinstance(kind := schema.get("type"), str) and kind != "object":
        raise PydanticCustomError("no_object", "must be the JSON schema of an object")
    return schema


class Function(Body):
    """What the model is told of a tool; `parameters` is a JSON schema, and without one there are no arguments.

    `strict` holds where a call is forced.
    """

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(of_object)] | None = None
    strict: bool | None = None


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function: dict[str, Any] = {"name": self.function.name, "description": self.function.description or ""}
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """What the arguments of a call must be: an object, also where the tool's schema takes that for granted."""
        if self.function.parameters is None:
            return {"type": "object", "additionalProperties": False}
        return {**self.function.parameters, "type": "object"}


class ChosenFunction(Body):
    """The name of the function to call."""

    name: str


class NamedTool(Body):
    """A choice of one tool."""

    type: Literal["function"]
    function: ChosenFunction


def refuse_other_messages(value: dict[str, Any]) -> None:
    """Raise UnsupportedParameterError for what messages can hold elsewhere but not here, by name."""
    messages = value.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        where = f"messages.{index}."
        if message.get("role") == "function":
            raise UnsupportedParameterError(
                "the function role is not supported: use tools and the tool role", param=f"{where}role"
            )
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UnsupportedParameterError(f"content of type {kind!r} is not supported", param=f"{where}content")


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked messages as chat templates take them; raises InvalidRequestError naming the message."""
    shown = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        message.check(where)
        shown.append(message.for_template(where))
    return shown
