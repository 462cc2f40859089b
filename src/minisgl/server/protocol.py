"""What a request may say, and how each endpoint's words become `SamplingParams`.

The fields are OpenAI's (API reference, chat/completions and completions) plus the sampling fields that engines
commonly add. What is known but not implemented yet is accepted in its neutral value only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.types import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
COMPLETION_MAX_TOKENS = 16
"""The default of `max_tokens` in /v1/completions."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Known fields that are not implemented, each with the values that ask for nothing; null is always one."""

NEUTRAL_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "reasoning_content": ("",),
}
"""The same for the fields of a message, so that an answer can be sent back as it came."""

Number = Annotated[float, Field(allow_inf_nan=False)]
NonEmpty = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Body(BaseModel):
    """Values keep their JSON type ("5" is no number), and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Body):
    """`include_usage`: a last chunk says how many tokens it took."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Body):
    """What both endpoints share. `user` and the fields beside it label a request and change nothing in the answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    seed: int | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Read a request's body; raises InvalidRequestError or UnsupportedParameterError naming the field."""
        try:
            value = pydantic_core.from_json(body)
        except ValueError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(value, dict):
            raise InvalidRequestError("the body must be a JSON object", code="invalid_json")
        drop_neutral(value, NEUTRAL)
        cls.prepare(value)
        try:
            request = cls.model_validate(value)
        except ValidationError as error:
            raise invalid_field(error) from error
        if request.stream_options is not None and not request.stream:
            raise InvalidRequestError("stream_options is only allowed with stream", param="stream_options")
        return request

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Change what an endpoint needs changed before validation."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, max_tokens: int | None) -> SamplingParams:
        """The engine's parameters, with this limit; raises InvalidRequestError naming the field out of range."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=self.skip_special_tokens is not False,
        ).validate()


class TextPart(Body):
    """A piece of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation. `developer` is OpenAI's newer word for `system`, the one templates know."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it; text parts become lines."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Refuse what messages can hold elsewhere but not here, by name."""
        messages = value.get("messages")
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if not isinstance(message, dict):
                continue
            where = f"messages.{index}."
            if message.get("role") in ("tool", "function"):
                raise UnsupportedParameterError("tool messages are not supported yet", param=f"{where}role")
            drop_neutral(message, NEUTRAL_IN_MESSAGE, where)
            if message.get("content") is None and message.get("role") != "assistant":
                raise InvalidRequestError(f"{where}content is required", param=f"{where}content")
            parts = message.get("content")
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict) and part.get("type") in ("image_url", "input_audio", "file", "refusal"):
                    raise UnsupportedParameterError(f"{part['type']} is not supported yet", param=f"{where}content")

    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside the messages."""
        variables = dict(self.chat_template_kwargs or {})
        if "add_generation_prompt" in variables:
            raise InvalidRequestError("add_generation_prompt is a field of its own", param="chat_template_kwargs")
        return {"add_generation_prompt": self.add_generation_prompt is not False, **variables}

    def params(self) -> SamplingParams:
        """Sampling parameters; without a limit the answer may go on to the model's."""
        limits = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
        if len(limits) > 1:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        return self.sampling_params(limits.pop() if limits else None)


class CompletionRequest(Sampling):
    """The body of /v1/completions. `prompt` is checked by `prompts`."""

    prompt: Any

    def params(self) -> SamplingParams:
        """Sampling parameters; without a limit 16 tokens are generated, as OpenAI does."""
        return self.sampling_params(COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens)

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, a text or token ids: one choice each, in this order."""
        value = self.prompt
        if isinstance(value, str) or (is_list_of(int, value) and value):
            value = [value]
        texts, ids = is_list_of(str, value), isinstance(value, list) and all(is_list_of(int, p) for p in value)
        if not (texts or ids):
            rule = "prompt must be a string, a list of strings, token ids or a list of lists of token ids"
            raise InvalidRequestError(rule, param="prompt")
        if not value or not all(value):
            raise InvalidRequestError("prompt must not be empty", param="prompt")
        return list(value)


T = TypeVar("T")


def invalid_field(error: ValidationError) -> InvalidRequestError:
    """The first complaint of pydantic, naming the field as the user wrote it: `messages.0.role`."""
    first = error.errors(include_url=False, include_context=False)[0]
    # Between the fields, `loc` names the members of unions: "str", "constrained-str", "list[TextPart]".
    parts = [str(part) for part in first["loc"]]
    param = ".".join(part for part in parts if part != "str" and (part.isidentifier() or part.isdigit()))
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
    return InvalidRequestError(f"{param}: {first['msg']}", param=param)


def is_list_of(kind: type[T], value: object) -> bool:
    """Whether `value` is a list of exactly this type (a bool is no int)."""
    return isinstance(value, list) and all(type(item) is kind for item in value)


def drop_neutral(value: dict[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Remove known fields that ask for nothing; raises UnsupportedParameterError for one that asks for something."""
    for name in neutral.keys() & value.keys():
        given = value.pop(name)
        same = any(given == ok and isinstance(given, bool) == isinstance(ok, bool) for ok in neutral[name])
        if given is not None and not same:
            raise UnsupportedParameterError(f"{where}{name} is not supported yet", param=where + name)
