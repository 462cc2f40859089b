"""Requests, sampling parameters and events: msgspec structs, for calls of the engine (offline) and sockets (server)."""

import enum
from array import array
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from minisgl.errors import ContextLengthError, InvalidRequestError, UnknownKeywordError, did_you_mean

MAX_STOP_TOKEN_IDS = 32  # of a request, EOS ids included; the width of the device table that masks them
MAX_LOGPROBS = 20  # most probable tokens whose log-probabilities a request may ask for at each position
MAX_LOGIT_BIAS = 1024  # tokens a request may bias
MAX_BAD_WORDS = 1024  # words a request may forbid


class FinishReason(enum.StrEnum):
    """Why a request ended. The values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


REASONING_START, REASONING_END = "<think>", "</think>"  # the tags around a model's reasoning


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """Tool calls that a completion may be: one, or with `several` more."""

    schema: str  # the JSON schema of one call, as text
    several: bool
    opening: str = ""  # this and the next surround each
    closing: str = ""
    separator: str = ""  # between two


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What a completion's text must match: a JSON schema, a regular expression, a JSON list of choices, or Lark."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "lark"]
    source: str = ""  # of any JSON object it is empty
    calls: Calls | None = None  # allowed instead
    reasoning: Literal["none", "possible", "begun"] = "none"  # before either; the prompt may have begun it
    compact: bool = False  # JSON has no white space between its parts


class SuggestingMeta(msgspec.StructMeta):
    """Of structs whose constructor suggests a name for a keyword that it does not have."""

    def __call__(cls, *args: Any, **keywords: Any) -> Any:
        try:
            return super().__call__(*args, **keywords)
        except TypeError as error:
            for name in keywords.keys() - cls.__struct_fields__:
                text = f"{cls.__name__} has no parameter {name}{did_you_mean(name, cls.__struct_fields__)}"
                raise UnknownKeywordError(text) from error
            raise


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, metaclass=SuggestingMeta):
    """How to sample the tokens of one request, and when to end it.

    `temperature` 0 is greedy. `top_k` 0 or -1 keeps the whole vocabulary. With `seed` None a random one is used.
    `max_tokens` None means "up to the model's limit". `stop` is matched on text and cut from it; `stop_token_ids` end
    the request beside the model's EOS ids; neither acts before `min_tokens` tokens were generated.

    Logits are changed in this order, before temperature and filters: `repetition_penalty` (of tokens in the prompt or
    the output, Keskar et al. 2019: a positive logit is divided by it, a negative one multiplied), `frequency_penalty`
    times a token's count in the output and `presence_penalty` once for it, both subtracted (OpenAI), `logit_bias`
    added; then what `grammar` forbids is masked. `logprobs` asks for the log-probability of each token generated and
    of that many most probable ones, by the model's own logits; `prompt_logprobs` for the same of the prompt.

    `allowed_token_ids` are the only tokens that may be sampled. The sequences of tokens in `bad_word_ids` are not
    generated: the last token of one is forbidden where the completion ends in those before it; the tokenizer adds those
    of `bad_words`. `include_stop_str_in_output` keeps the stop string, or the text of the stop token, in the text.
    `truncate_prompt_tokens` cuts a longer prompt to its last tokens, with -1 to as many as leave room for `max_tokens`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            if isinstance(text := getattr(self, name), str):  # as OpenAI allows; as a sequence it is its characters
                msgspec.structs.force_setattr(self, name, (text,))

    def validate(self) -> "SamplingParams":
        """Return self; raise InvalidRequestError naming the first parameter that is out of range."""

        def check(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{param} must be {rule}, got {getattr(self, param)!r:.200}", param=param)

        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        check(-1 <= self.top_k < 2**31, "top_k", "-1 or 0 (off), or a positive 32-bit integer")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(self.min_tokens >= 0, "min_tokens", "at least 0")
        check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        check(all(self.stop), "stop", "made of non-empty strings")
        check(all(0 <= t < 2**31 for t in self.stop_token_ids), "stop_token_ids", "made of token ids")
        check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0, at most 100")
        check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"of at most {MAX_LOGIT_BIAS} tokens")
        check(all(0 <= t < 2**31 for t in self.logit_bias), "logit_bias", "a map from token ids")
        check(all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()), "logit_bias", "between -100 and 100 each")
        for name, asked in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            check(asked is None or 0 <= asked <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")
        allowed, cut = self.allowed_token_ids, self.truncate_prompt_tokens
        check(allowed is None or min(allowed, default=-1) >= 0, "allowed_token_ids", "made of token ids, at least one")
        check(len(self.bad_words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS} words")
        check(all(word.strip() for word in self.bad_words), "bad_words", "made of words")
        check(all(ids and min(ids) >= 0 for ids in self.bad_word_ids), "bad_word_ids", "made of lists of token ids")
        check(cut is None or cut == -1 or cut >= 1, "truncate_prompt_tokens", "-1 or at least 1")
        return self


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenised request as the engine takes it; `id` is unique among live requests.

    Of waiting requests those with the lowest `priority` are admitted first, and of running ones those with the highest
    retracted first; arrival decides between equals.
    """

    id: str
    prompt_bytes: bytes  # int32, little-endian: a socket carries it, and numpy reads it, without a copy of each id
    params: SamplingParams
    priority: int = 0

    @classmethod
    def make(cls, id: str, prompt: Sequence[int], params: SamplingParams, priority: int = 0) -> "Request":
        """A request from token ids that `ModelInfo.check` accepts. Raises InvalidRequestError for the priority."""
        if not -(2**31) <= priority < 2**31:
            raise InvalidRequestError(f"priority must be a 32-bit integer, got {priority}", param="priority")
        return cls(id=id, prompt_bytes=array("i", prompt).tobytes(), params=params, priority=priority)

    @property
    def prompt(self) -> "memoryview[int]":
        return memoryview(self.prompt_bytes).cast("i")


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The natural log-probability of a token, and the most probable tokens at its position, highest first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did for one request: new tokens, and in the last event of the request why it ended.

    Every accepted request ends with exactly one event whose `finish` is set; no event follows it.
    """

    id: str
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of `tokens`, where the request asked for them
    # Of each prompt token, with the first of `tokens`; None for the first, which nothing precedes.
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of a model to check requests before they go to its engine."""

    name: str
    vocab_size: int
    max_seq_len: int
    eos_token_ids: tuple[int, ...]

    def truncate(self, prompt: list[int], params: SamplingParams) -> list[int]:
        cut = params.truncate_prompt_tokens
        if cut == -1:
            cut = max(1, self.max_seq_len - (params.max_tokens or 1))
        return prompt if cut is None or cut < 1 else prompt[-cut:]

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise InvalidRequestError or ContextLengthError when this model can never serve such a request."""
        params.validate()
        if not prompt:
            raise InvalidRequestError("the prompt must hold at least one token", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise InvalidRequestError(f"token ids must be between 0 and {self.vocab_size - 1}", param="prompt")
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            if max(getattr(params, name) or (0,)) >= self.vocab_size:
                raise InvalidRequestError(f"{name} must be of tokens below {self.vocab_size}", param=name)
        if len(set(params.stop_token_ids) | set(self.eos_token_ids)) > MAX_STOP_TOKEN_IDS:
            allowed = MAX_STOP_TOKEN_IDS - len(self.eos_token_ids)
            raise InvalidRequestError(f"at most {allowed} stop_token_ids are allowed", param="stop_token_ids")
        if len(params.allowed_token_ids or ()) > self.vocab_size:
            raise InvalidRequestError(f"allowed_token_ids must be at most {self.vocab_size}", param="allowed_token_ids")
        limit = f"this model's maximum context length is {self.max_seq_len} tokens"
        if len(prompt) >= self.max_seq_len:
            raise ContextLengthError(f"{limit}, but the prompt has {len(prompt)} and leaves no room", param="prompt")
        wanted = len(prompt) + (params.max_tokens or 0)
        if wanted > self.max_seq_len:
            parts = f"{len(prompt)} in the prompt and max_tokens {params.max_tokens}"
            raise ContextLengthError(f"{limit}, but {wanted} were asked for ({parts})", param="max_tokens")


class ChunkRecord(msgspec.Struct, frozen=True, array_like=True):
    """`length` prompt tokens of a request, behind `start` others; with the `last` ones it samples a token."""

    id: str
    start: int
    length: int
    last: bool


class StepRecord(msgspec.Struct, kw_only=True):
    """What a step did and when, requests named by their ids. Times are in s on the engine's clock."""

    step: int
    planned: float  # the host plans until `launched`
    launched: float  # it launches until `sent`
    sent: float
    awaited: float = 0.0  # it waits for the result until `arrived`
    arrived: float = 0.0
    committed: float = 0.0  # it has taken the result in
    device: tuple[float, float] | None = None  # when the device began and ended
    decodes: list[str]
    chunks: list[ChunkRecord]
    admitted: list[tuple[str, int]]  # with the tokens found in the prefix cache
    retracted: list[str]  # since the step before was launched
    ended: list[tuple[str, FinishReason]] = []
    running: int
    waiting: int
    pages_free: int
    pages_cached: int


class EngineStats(msgspec.Struct, kw_only=True):
    """The engine's counts at a moment; pages are KV pages, `waiting_tokens` those of waiting prompts."""

    running: int = 0
    max_running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_evictable: int = 0  # cached ones that no request uses
    steps: int = 0
    retracted: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def pages_held(self) -> int:
        """Pages that requests use, their own and cached ones."""
        return self.pages_total - self.pages_free - self.pages_evictable
