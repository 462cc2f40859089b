"""The bodies of /v1/chat/completions and /v1/completions: what they may say, and what is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from minisgl.core.types import MAX_LOGPROBS, Grammar, SamplingParams
from minisgl.errors import InvalidRequestError
from minisgl.server.body import Body, Neutral, Nothing, Whole, is_list_of
from minisgl.server.elsewhere import ChatElsewhere, CompletionElsewhere
from minisgl.server.messages import MAX_TOOLS, Message, NamedTool, Tool, refuse_other_messages
from minisgl.server.sampling import MAX_CHOICES, MaxTokens, Sampling

COMPLETION_MAX_TOKENS = 16
"""The default of `max_tokens` in /v1/completions."""
MAX_MESSAGES = 16384
"""Messages of a conversation; a template takes a time for each."""

Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole]


NonEmptyText = Annotated[str, Field(min_length=1)]
Texts = NonEmptyText | Annotated[list[NonEmptyText], Field(min_length=1)]
Ids = Annotated[list[int], Field(min_length=1, json_schema_extra={"items": {"type": "integer", "minimum": 0}})]
TokenIds = Ids | Annotated[list[Ids], Field(min_length=1)]


class Conversation(Body):
    """What becomes a prompt through the chat template."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Refuse kinds of messages that are known and not supported."""
        refuse_other_messages(value)

    def check_continuation(self) -> None:
        """Raise InvalidRequestError when the last message cannot be continued as asked."""
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
            raise InvalidRequestError(
                "continue_final_message needs a last message of the assistant's, without tool calls",
                param="continue_final_message",
            )

    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets beside messages and tools."""
        variables = dict(self.chat_template_kwargs or {})
        for name in ("add_generation_prompt", "continue_final_message", "tools"):
            if name in variables:
                raise InvalidRequestError(f"{name} is a field of its own", param="chat_template_kwargs")
        return variables


class ChatRequest(Conversation, Sampling, ChatElsewhere):
    """The body of /v1/chat/completions."""

    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    functions: Annotated[Any, Neutral([])] = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    audio: Nothing = None
    prediction: Nothing = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Nothing = None

    def check(self) -> None:
        """Raise InvalidRequestError for fields that do not go together."""
        self.check_stream_options()
        self.check_continuation()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs", param="top_logprobs")
        if not self.tools and self.tool_choice not in (None, "auto", "none"):
            raise InvalidRequestError("tool_choice needs tools", param="tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequestError("two tools have the same name", param="tools")
        if self.forced_tool is not None and self.forced_tool not in names:
            raise InvalidRequestError(f"tool_choice names {self.forced_tool!r}, which is no tool", param="tool_choice")
        if self.offered_tools and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message does not go with tools, unless tool_choice is none",
                param="continue_final_message",
            )

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call; none when `tool_choice` says so."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def forced_tool(self) -> str | None:
        """The one function that must be called, if one is named."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or self.forced_tool is not None

    def params(self, grammar: Grammar | None = None) -> SamplingParams:
        """Sampling parameters; without a limit the answer may go on to the model's."""
        limits = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
        if len(limits) > 1:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        with self.named_limit():
            return self.sampling_params(limits.pop() if limits else None, logprobs, None, grammar)

    @contextlib.contextmanager
    def named_limit(self) -> Iterator[None]:
        """Errors of the limit name the field that the request has for it."""
        try:
            yield
        except InvalidRequestError as error:
            if error.param == "max_tokens" and self.max_tokens is None:
                error.param = "max_completion_tokens"
                error.message = error.message.replace("max_tokens", error.param)
            raise


class CompletionRequest(Sampling, CompletionElsewhere):
    """The body of /v1/completions. `prompt` is checked by `prompts`."""

    prompt: Texts | TokenIds
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    suffix: Annotated[Any, Neutral("")] = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        """Check the prompts here: what a union of their types says of a bad one helps nobody."""
        if "prompt" in value:
            check_prompts(value["prompt"])

    @property
    def drawn(self) -> int:
        """Answers that are generated for each prompt; the best of them are returned."""
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def scores_only(self) -> bool:
        """Whether only the prompt is wanted: `echo` with a `max_tokens` of 0."""
        return bool(self.echo) and self.max_tokens == 0

    def check(self) -> None:
        """Raise InvalidRequestError for fields that do not go together."""
        self.check_stream_options()
        if self.drawn < self.num_choices:
            raise InvalidRequestError("best_of must be at least n", param="best_of")
        if self.drawn > self.num_choices and self.stream:
            raise InvalidRequestError("best_of above n cannot be streamed: which is best shows last", param="best_of")

    def params(self, grammar: Grammar | None = None) -> SamplingParams:
        """Sampling parameters; without a limit 16 tokens are generated, as OpenAI does.

        An answer of no tokens is one token to the engine. The best answers are found by their log-probabilities.
        """
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        logprobs = 0 if self.logprobs is None and self.drawn > self.num_choices else self.logprobs
        prompt_logprobs = self.logprobs if self.echo else None
        return self.sampling_params(1 if self.scores_only else limit, logprobs, prompt_logprobs, grammar)

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, a text or token ids, in this order."""
        value: Any = self.prompt
        return [value] if isinstance(value, str) or isinstance(value[0], int) else list(value)


def check_prompts(value: Any) -> None:
    """Raise InvalidRequestError unless this is a prompt or several, none of them empty."""
    single = isinstance(value, str) or (is_list_of(int, value) and bool(value))
    several = is_list_of(str, value) or (isinstance(value, list) and all(is_list_of(int, p) for p in value))
    if not (single or several):
        rule = "prompt must be a string, a list of strings, token ids or a list of lists of token ids"
        raise InvalidRequestError(rule, param="prompt")
    if not value or (not single and not all(value)):
        raise InvalidRequestError("prompt must not be empty", param="prompt")
