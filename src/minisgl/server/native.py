"""The bodies of /generate, which is SGLang's, and of /tokenize and /detokenize, which are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from minisgl.core.types import Grammar, SamplingParams
from minisgl.errors import InvalidRequestError
from minisgl.server.body import Body, NotFalse, Nothing, NotTrue, Whole
from minisgl.server.elsewhere import GenerateElsewhere
from minisgl.server.messages import refuse_other_messages
from minisgl.server.protocol import Conversation, Logprobs, Texts, TokenIds, check_prompts
from minisgl.server.sampling import (
    Drawing,
    MaxTokens,
    Priority,
    Seed,
)

GENERATE_MAX_TOKENS = 128
"""The default of `max_new_tokens` in /generate."""


class NativeSampling(Drawing):
    """`sampling_params` of /generate."""

    max_new_tokens: Annotated[int, Field(json_schema_extra={"minimum": 1}), Whole] | None = None
    min_new_tokens: MaxTokens | None = None
    sampling_seed: Seed | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Nothing = None
    spaces_between_special_tokens: NotFalse = None
    no_stop_trim: NotTrue = None
    stop_regex: Nothing = None
    stream_interval: Nothing = None
    custom_params: Nothing = None

    @property
    def structured(self) -> dict[str, Any]:
        """What asks for a form of the answer, under the names that chats and completions have for it."""
        fields = {"guided_json": self.json_schema, "guided_regex": self.regex, "guided_grammar": self.ebnf}
        return {name: value for name, value in fields.items() if value is not None}

    def params(self, logprobs: int | None, prompt_logprobs: int | None, grammar: Grammar | None) -> SamplingParams:
        """The engine's parameters; raises InvalidRequestError naming the field out of range as it is called here."""
        try:
            return SamplingParams(
                **self.drawing(),
                seed=self.sampling_seed,
                max_tokens=GENERATE_MAX_TOKENS if self.max_new_tokens is None else self.max_new_tokens,
                min_tokens=self.min_new_tokens or 0,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
            ).validate()
        except InvalidRequestError as error:
            raise native_names(error) from error


NATIVE_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}


def native_names(error: InvalidRequestError) -> InvalidRequestError:
    """The same error with a sampling field named as /generate does."""
    if error.param in SamplingParams.__struct_fields__:
        name = NATIVE_NAMES.get(error.param, error.param)
        error.message = error.message.replace(error.param, name)
        error.param = f"sampling_params.{name}"
    return error


class GenerateRequest(GenerateElsewhere):
    """The body of /generate. `logprob_start_len` -1 gives no prompt log-probabilities, else those from there on."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [given], "properties": {given: {"not": {"type": "null"}}, other: {"type": "null"}}}
                for given, other in (("text", "input_ids"), ("input_ids", "text"))
            ]
        }
    )

    text: Texts | None = None
    input_ids: TokenIds | None = None
    sampling_params: NativeSampling | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Field(ge=-1), Whole] | None = None
    top_logprobs_num: Logprobs | None = None
    return_text_in_logprobs: bool | None = None
    priority: Priority | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Exactly one of `text` and `input_ids` has prompts."""
        given = [name for name in ("text", "input_ids") if value.get(name) is not None]
        if len(given) != 1:
            message = "text or input_ids is required" if not given else "give text or input_ids, not both"
            raise InvalidRequestError(message, param="text")
        try:
            check_prompts(value[given[0]])
        except InvalidRequestError as error:
            error.param = given[0]
            error.message = error.message.replace("prompt", given[0], 1)
            raise

    def check(self) -> None:
        """Raise InvalidRequestError for fields that do not go together."""
        nothing = {"logprob_start_len": -1, "top_logprobs_num": 0, "return_text_in_logprobs": False}
        for name, value in nothing.items():
            if getattr(self, name) not in (None, value) and not self.return_logprob:
                raise InvalidRequestError(f"{name} is only allowed with return_logprob", param=name)

    @property
    def sampling(self) -> NativeSampling:
        """The sampling parameters; none given are the defaults."""
        return self.sampling_params or NativeSampling()

    @property
    def is_batch(self) -> bool:
        """Whether the answer is a list: there are several prompts, or several answers to one."""
        value: Any = self.text if self.text is not None else self.input_ids
        single = isinstance(value, str) or isinstance(value[0], int)
        return not single or self.num_choices > 1

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.sampling.n or 1

    @property
    def prompt_logprobs_from(self) -> int | None:
        """The prompt position from which log-probabilities are wanted, None for none."""
        wanted = self.return_logprob and self.logprob_start_len is not None and self.logprob_start_len >= 0
        return self.logprob_start_len if wanted else None

    def params(self, grammar: Grammar | None) -> SamplingParams:
        """The engine's parameters."""
        top = (self.top_logprobs_num or 0) if self.return_logprob else None
        return self.sampling.params(top, None if self.prompt_logprobs_from is None else top, grammar)

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, in this order."""
        value: Any = self.text if self.text is not None else self.input_ids
        return [value] if isinstance(value, str) or isinstance(value[0], int) else list(value)


class TokenizeText(Body):
    """A text to be tokenised by /tokenize."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @property
    def with_special_tokens(self) -> bool:
        """Whether BOS and such are added; they are unless told otherwise."""
        return self.add_special_tokens is not False


class TokenizeConversation(Conversation):
    """A conversation to be tokenised by /tokenize; its template writes the special tokens itself."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template: Nothing = None
    mm_processor_kwargs: Nothing = None

    @property
    def with_special_tokens(self) -> bool:
        """Whether BOS and such are added; they are where told so."""
        return bool(self.add_special_tokens)

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """As in a chat."""
        refuse_other_messages(value)


class DetokenizeRequest(Body):
    """Tokens to be written as text by /detokenize."""

    tokens: Annotated[list[int], Field(fail_fast=True)]
    model: str | None = None
    skip_special_tokens: bool | None = None
