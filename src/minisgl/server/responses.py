"""The objects that responses are made of, under their names in the APIs; msgspec encodes them."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from minisgl.core.types import EngineStats

SSE_DONE = b"data: [DONE]\n\n"
FinishWord = Literal["stop", "length", "tool_calls"]
ResultKind = Literal["chat.completion", "chat.completion.chunk", "text_completion"]
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
    # In a stream a call's first delta has all of them, the others only its index and more arguments.
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


class PromptLogprob(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None  # from 1; null where the token is not among those asked for
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # for each prompt token; by token id


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What ended a choice, in vLLM's word (a stop string or one of `stop_token_ids`) and SGLang's (or EOS), and ids."""

    stop_reason: int | str | UnsetType | None = UNSET
    matched_stop: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET  # where they were asked for


class ChatChoice(Ended, frozen=True):
    index: int
    message: AssistantMessage
    finish_reason: FinishWord | None
    logprobs: ChatLogprobs | None = None


class ChunkChoice(Ended, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: FinishWord | None = None
    logprobs: ChatLogprobs | None = None


class TextChoice(Ended, frozen=True):
    index: int
    text: str
    finish_reason: FinishWord | None = None
    logprobs: TextLogprobs | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


AnyChoice = TypeVar("AnyChoice", ChatChoice, ChunkChoice, TextChoice)


class Result(msgspec.Struct, Generic[AnyChoice], frozen=True, kw_only=True):
    id: str
    object: ResultKind
    created: int
    model: str
    choices: Sequence[AnyChoice]
    usage: Usage | UnsetType | None = UNSET  # in a stream only where it was asked for
    prompt_token_ids: list[int] | UnsetType = UNSET  # of a chat, these two; in a stream in its first chunk
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class SglangMeta(msgspec.Struct, frozen=True):
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
    text: str  # in a stream all of it so far
    output_ids: list[int]
    meta_info: SglangMeta
    index: int | UnsetType = UNSET  # which one of several it is


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
    tokenizer_class: str
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "minisgl"
    root: str  # what --model says
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Health(msgspec.Struct, frozen=True):
    running: int
    waiting: int
    status: Literal["ok"] = "ok"


class IsReady(msgspec.Struct, frozen=True):
    status: Literal["ready"] = "ready"


class Version(msgspec.Struct, frozen=True):
    version: str


class Queued(msgspec.Struct, frozen=True):
    requests: int
    tokens: int


class RankLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of the engine under SGLang's names; token counts are of KV pages, a waiting prompt's of all of it."""

    dp_rank: int = 0
    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_waiting_uncached_tokens: int
    num_used_tokens: int
    num_total_tokens: int  # used and waiting
    max_total_num_tokens: int
    max_running_requests: int
    token_usage: float
    utilization: float  # running of max_running_requests
    cache_hit_rate: float  # since the start
    gen_throughput: float  # tokens/s since the call before


class Loads(msgspec.Struct, frozen=True, kw_only=True):
    timestamp: str  # ISO 8601
    version: str
    dp_rank_count: int = 1
    loads: list[RankLoad]
    aggregate: dict[str, int]  # for gateways of earlier versions


class ServerLoad(msgspec.Struct, frozen=True):
    server_load: int  # requests that wait or run


class ServerInfo(msgspec.Struct, frozen=True):
    version: str
    config: dict[str, Any]  # as given
    effective: Sequence[str]  # a line for each value that was chosen
    stats: EngineStats
    queued: Queued
    draining: bool
    uptime: float  # s
    # SGLang's names, which gateways read
    model_path: str
    served_model_name: str
    tp_size: int
    context_length: int
    max_total_num_tokens: int
    max_running_requests: int
    dp_size: int = 1


class ModelFacts(msgspec.Struct, frozen=True):
    id: str
    served_names: Sequence[str]
    model_path: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: Sequence[int]
    has_chat_template: bool
    tokenizer_path: str
    is_generation: bool = True
    preferred_sampling_params: None = None


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


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def sse(value: object) -> bytes:
    """A server-sent event (WHATWG HTML, section 9.2)."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
