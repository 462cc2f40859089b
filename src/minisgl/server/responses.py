"""The objects that responses are made of, under their names in the APIs; msgspec encodes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import EngineStats, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; OpenAI's value."""

FinishWord = Literal["stop", "length", "tool_calls"]
TokenEntry = tuple[float | None, int, str | None]
"""Log-probability, token id, and its text where that was asked for."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Counts of tokens; the token that ended a text is among the completion's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionCall(msgspec.Struct, frozen=True):
    """The function that is called, and the text of a JSON object, or in a stream more of it."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call; in a stream its first delta has id, type and name, the others only more arguments."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCall


class ChatDelta(msgspec.Struct, frozen=True):
    """A part of a chat answer; the first one has the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """A whole chat answer; `content` is null when it is nothing but calls."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A token; `bytes` is exact where `token`, as text, cannot be."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob, frozen=True):
    """A token of the answer, and the most probable ones at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """The tokens of a completion or of a part of it; `text_offset` in characters from the beginning of its text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


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


class NativeMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What /generate says beside the text; `e2e_latency` in s."""

    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    output_token_logprobs: list[TokenEntry] | UnsetType = UNSET
    output_top_logprobs: list[list[TokenEntry] | None] | UnsetType = UNSET
    input_token_logprobs: list[TokenEntry] | UnsetType = UNSET
    input_top_logprobs: list[list[TokenEntry] | None] | UnsetType = UNSET


class NativeResult(msgspec.Struct, frozen=True, kw_only=True):
    """/generate's answer, in a stream all of it so far; `index` says which one of several it is."""

    text: str
    output_ids: list[int]
    meta_info: NativeMeta
    index: int | UnsetType = UNSET


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """A text's tokens; `token_strs` are their names in the vocabulary, where they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


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
    """The body of /abort_request: the id of an answer, or `abort_all`."""

    rid: str | None = None
    abort_all: bool = False


class IsReady(msgspec.Struct, frozen=True):
    status: Literal["ready"] = "ready"


class Version(msgspec.Struct, frozen=True):
    version: str


class Queued(msgspec.Struct, frozen=True):
    """Requests without their first token, and the tokens of their prompts."""

    requests: int
    tokens: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`config` is as given, `effective` a line for each value that was chosen; `uptime` is in s."""

    version: str
    config: dict[str, Any]
    effective: list[str]
    stats: EngineStats
    queued: Queued
    draining: bool
    uptime: float


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


class ScoredToken(NamedTuple):
    """A token, its log-probabilities (None at the beginning of a prompt), and where its text begins in its choice's."""

    token: int
    logprobs: TokenLogprobs | None
    start: int


class LogprobWriter:
    """Writes log-probabilities with the tokens of a vocabulary; `as_ids` writes `token_id:5` for them."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._as_ids = as_ids

    def text(self, token: int) -> str:
        """A token as text. A part of a character is `bytes:` and its bytes, escaped."""
        if self._as_ids:
            return f"token_id:{token}"
        value = self._token_bytes(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def chat(self, scored: Iterable[ScoredToken]) -> ChatLogprobs:
        content = []
        for token, found, _ in scored:
            if found is not None:
                top = zip(found.top_ids, found.top_logprobs, strict=True)
                tops = [TopLogprob(*self._entry(*entry)) for entry in top]
                content.append(ChatTokenLogprob(*self._entry(token, found.logprob), tops))
        return ChatLogprobs(content)

    def _entry(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self.text(token), finite(logprob), list(self._token_bytes(token))

    def completion(self, scored: Iterable[ScoredToken]) -> TextLogprobs:
        """The token itself is always among the most probable ones."""
        written = TextLogprobs([], [], [], [])
        for token, found, start in scored:
            top: dict[str, float] | None = None
            if found is not None:
                top = {}
                for other, logprob in zip((*found.top_ids, token), (*found.top_logprobs, found.logprob), strict=True):
                    top.setdefault(self.text(other), finite(logprob))
            written.tokens.append(self.text(token))
            written.token_logprobs.append(None if found is None else finite(found.logprob))
            written.top_logprobs.append(top)
            written.text_offset.append(start)
        return written


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def mean_logprob(scored: Sequence[ScoredToken]) -> float:
    """The mean over an answer's tokens, by which answers of different length compare."""
    values = [entry.logprobs.logprob for entry in scored if entry.logprobs is not None]
    return sum(values) / len(values) if values else LEAST_LOGPROB


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with `value` as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def sse(value: object) -> bytes:
    """A server-sent event with `value` as JSON (WHATWG HTML, section 9.2)."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
