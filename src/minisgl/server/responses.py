"""The objects that responses are made of, as OpenAI's API reference names them; msgspec encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import msgspec
from starlette.responses import Response

Unset = msgspec.UnsetType


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """`cached_tokens` prompt tokens had their KV in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Counts of tokens; the token that ended a text is among the completion's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> Usage:
        """The usage of these counts."""
        return cls(prompt, completion, prompt + completion, PromptTokensDetails(cached))


class FunctionCall(msgspec.Struct, frozen=True):
    """Whom a call calls, and with what: the text of a JSON object."""

    arguments: str
    name: str | Unset = msgspec.UNSET


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call; in a stream its first piece has id, type and name, the others only more arguments."""

    index: int | Unset = msgspec.UNSET
    id: str | Unset = msgspec.UNSET
    type: Literal["function"] | Unset = msgspec.UNSET
    function: FunctionCall


class AssistantMessage(msgspec.Struct, frozen=True):
    """A whole answer; `content` is null when it is nothing but calls."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | Unset = msgspec.UNSET
    tool_calls: list[ToolCall] | Unset = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True):
    """A piece of an answer; the first one has the role."""

    role: str | Unset = msgspec.UNSET
    content: str | Unset = msgspec.UNSET
    reasoning_content: str | Unset = msgspec.UNSET
    tool_calls: list[ToolCall] | Unset = msgspec.UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that might have come; `bytes` is exact where `token`, as text, cannot be."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token of the answer, and the likeliest at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The tokens of a chat answer or of a piece of it."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """The tokens of a completion or of a piece of it; `text_offset` in characters from the beginning of its text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishWord = Literal["stop", "length", "tool_calls"]


class ChatChoice(msgspec.Struct, frozen=True):
    """A whole chat answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishWord | None
    logprobs: ChatLogprobs | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """A piece of a chat answer."""

    index: int
    delta: Delta
    finish_reason: FinishWord | None = None
    logprobs: ChatLogprobs | None = None


class TextChoice(msgspec.Struct, frozen=True):
    """A completion, whole or a piece of it."""

    index: int
    text: str
    finish_reason: FinishWord | None = None
    logprobs: TextLogprobs | None = None


Choice = TypeVar("Choice", ChatChoice, ChunkChoice, TextChoice)


class Result(msgspec.Struct, Generic[Choice], frozen=True, kw_only=True):
    """The envelope of every answer. `usage` is unset in the chunks of a stream that was not asked for it."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: Sequence[Choice]
    usage: Usage | Unset | None = msgspec.UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of /v1/models; `max_model_len` is the longest sequence in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minisgl"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    """What /v1/models says."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Health(msgspec.Struct, frozen=True):
    """What /health says when all is well: requests that run and wait."""

    running: int
    waiting: int
    status: Literal["ok"] = "ok"


class ErrorObject(msgspec.Struct, frozen=True):
    """An error; `param` is the field of the request that is at fault, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every response that is no success."""

    error: ErrorObject


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with `value` as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def sse(value: object) -> bytes:
    """A server-sent event with `value` as JSON (WHATWG HTML, section 9.2)."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
