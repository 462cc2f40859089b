"""The objects that responses are made of, under their names in the APIs; msgspec encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from minisgl.core.types import EngineStats

SSE_DONE = b"data: [DONE]\n\n"
FinishWord = Literal["stop", "length", "tool_calls"]
TokenEntry = tuple[float | None, int, str | None]  # log-probability, token id, and its text where it was asked for


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int  # with the token that ended the text
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionCall(msgspec.Struct, frozen=True):
    arguments: str  # the text of a JSON object, or in a stream more of it
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call; in a stream its first delta has id, type and name, the others only more arguments."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCall


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str | None  # null when there is nothing but calls
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]  # exact where the text cannot be


class ChatTokenLogprob(TopLogprob, frozen=True):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters from the beginning of the choice's text


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AssistantMessage
    finish_reason: FinishWord | None
    logprobs: ChatLogprobs | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: FinishWord | None = None
    logprobs: ChatLogprobs | None = None


class TextChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishWord | None = None
    logprobs: TextLogprobs | None = None


AnyChoice = TypeVar("AnyChoice", ChatChoice, ChunkChoice, TextChoice)


class Result(msgspec.Struct, Generic[AnyChoice], frozen=True, kw_only=True):
    """OpenAI's envelope. `usage` is unset in the chunks of a stream that was not asked for it."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: Sequence[AnyChoice]
    usage: Usage | UnsetType | None = UNSET


class SglangMeta(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float  # s
    output_token_logprobs: list[TokenEntry] | UnsetType = UNSET
    output_top_logprobs: list[list[TokenEntry] | None] | UnsetType = UNSET
    input_token_logprobs: list[TokenEntry] | UnsetType = UNSET
    input_top_logprobs: list[list[TokenEntry] | None] | UnsetType = UNSET


class SglangResult(msgspec.Struct, frozen=True, kw_only=True):
    """/generate's completion, in a stream all of it so far; `index` says which one of several it is."""

    text: str
    output_ids: list[int]
    meta_info: SglangMeta
    index: int | UnsetType = UNSET


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None  # their names in the vocabulary, where they were asked for


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minisgl"
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Health(msgspec.Struct, frozen=True):
    running: int
    waiting: int
    status: Literal["ok"] = "ok"


class AbortOrder(msgspec.Struct, forbid_unknown_fields=True):
    """The body of /abort_request: the id of a completion, or `abort_all`."""

    rid: str | None = None
    abort_all: bool = False


class IsReady(msgspec.Struct, frozen=True):
    status: Literal["ready"] = "ready"


class Version(msgspec.Struct, frozen=True):
    version: str


class Queued(msgspec.Struct, frozen=True):
    requests: int
    tokens: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    config: dict[str, Any]  # as given
    effective: list[str]  # a line for each value that was chosen
    stats: EngineStats
    queued: Queued
    draining: bool
    uptime: float  # s


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    served_names: list[str]
    model_path: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    has_chat_template: bool


class FlushReport(msgspec.Struct, frozen=True):
    flushed_pages: int


class Aborted(msgspec.Struct, frozen=True):
    aborted: int


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorObject


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def sse(value: object) -> bytes:
    """A server-sent event (WHATWG HTML, section 9.2)."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
