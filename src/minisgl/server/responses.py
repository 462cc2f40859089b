"""The objects that responses are made of, as OpenAI's API reference names them; msgspec encodes them."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.responses import Response

from minisgl.types import FinishReason

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


class AssistantMessage(msgspec.Struct, frozen=True):
    """A whole answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(msgspec.Struct, frozen=True):
    """A piece of an answer; the first one has the role."""

    role: str | Unset = msgspec.UNSET
    content: str | Unset = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """A whole chat answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    """A piece of a chat answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class TextChoice(msgspec.Struct, frozen=True):
    """A completion, whole or a piece of it."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: None = None


Choice = ChatChoice | ChunkChoice | TextChoice


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The envelope of every answer. `usage` is unset in the chunks of a stream that was not asked for it."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChunkChoice] | list[TextChoice]
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


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with `value` as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def sse(value: object) -> bytes:
    """A server-sent event with `value` as JSON (WHATWG HTML, section 9.2)."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
