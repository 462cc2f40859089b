"""The fields that chats and completions share, and how they become `SamplingParams`.

They are OpenAI's (API reference, chat/completions and completions) plus those that engines commonly add.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from minisgl.core.types import MAX_LOGIT_BIAS, Grammar, SamplingParams
from minisgl.errors import InvalidRequestError
from minisgl.server.body import Body, Neutral, Number, Whole

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_CHOICES = 128
"""Answers that may be asked for one prompt."""

NonEmpty = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenIdText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenIdText, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"additionalProperties": False}),
]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
MaxTokens = Annotated[int, Field(json_schema_extra={"minimum": 0}), Whole]
"""The bounds of these are `SamplingParams`' to check; the document has them too."""
Temperature = Annotated[Number, Field(json_schema_extra={"minimum": 0, "maximum": 100})]
TopP = Annotated[Number, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]
TopK = Annotated[int, Field(json_schema_extra={"minimum": -1, "exclusiveMaximum": 2**31}), Whole]
MinP = Annotated[Number, Field(json_schema_extra={"minimum": 0, "maximum": 1})]
Repetition = Annotated[Number, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 100})]
Seed = Annotated[int, Field(json_schema_extra={"minimum": -(2**63), "exclusiveMaximum": 2**64}), Whole]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31), Whole]

STRUCTURED_FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""What asks for a form of the answer; `structured.grammar_from_request` reads them."""


class StreamOptions(Body):
    """`include_usage`: a last chunk says how many tokens it took; `continuous_usage_stats`: every chunk does."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Drawing(Body):
    """How every endpoint lets tokens be drawn, under the names that all of them share."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None

    def drawing(self) -> dict[str, Any]:
        """What of SamplingParams these fields say."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "ignore_eos": bool(self.ignore_eos),
            "skip_special_tokens": self.skip_special_tokens is not False,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
        }


class Sampling(Drawing):
    """What both endpoints share. `user` and the fields beside it label a request and change nothing in the answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None
    min_tokens: MaxTokens | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Priority | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def structured(self) -> dict[str, Any]:
        """The fields that ask for a form of the answer and are set."""
        values = {name: getattr(self, name) for name in STRUCTURED_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def check_stream_options(self) -> None:
        """Raise InvalidRequestError when a whole answer has options of a stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream", param="stream_options")

    def sampling_params(
        self, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None, grammar: Grammar | None
    ) -> SamplingParams:
        """The engine's parameters, with these; raises InvalidRequestError naming the field out of range."""
        return SamplingParams(
            **self.drawing(),
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
        ).validate()
