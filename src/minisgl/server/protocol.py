"""The bodies of the endpoints: their fields, what is refused by name, and how they become `SamplingParams`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from minisgl.core.types import MAX_LOGIT_BIAS, MAX_LOGPROBS, Grammar, SamplingParams
from minisgl.server.validation import (
    NULL,
    Body,
    ChoiceTexts,
    GrammarText,
    JsonSchema,
    Messages,
    NamedTool,
    Neutral,
    ResponseFormat,
    StructuredOutputs,
    Tool,
    Tools,
    drop_unsupported,
    prepare_messages,
    require,
)

COMPLETION_MAX_TOKENS = 16
"""The default of `max_tokens` in /v1/completions."""
GENERATE_MAX_TOKENS = 128
"""The default of `max_new_tokens` in /generate."""
MAX_CHOICES = 128
ANY_UNSUPPORTED: Neutral = {"return_hidden_states": (False,), "lora_path": (), "session_params": (), "rid": ()}
SAMPLING_UNSUPPORTED: Neutral = {
    **ANY_UNSUPPORTED,
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,), "length_penalty": (1,), "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,), "no_stop_trim": (False,), "truncate_prompt_tokens": (),
    "allowed_token_ids": (), "bad_words": ([],), "prompt_logprobs": (), "return_token_ids": (False,),
    "logits_processors": (), "guided_decoding_backend": (), "guided_whitespace_pattern": (), "regex": (), "ebnf": (),
    "json_schema": (), "stop_regex": (), "request_id": (), "cache_salt": (), "kv_transfer_params": (),
    "vllm_xargs": (),
}  # fmt: skip
"""OpenAI's, vLLM's and SGLang's fields (their API documentation) of both chats and completions."""
CHAT_UNSUPPORTED: Neutral = {
    **SAMPLING_UNSUPPORTED,
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "verbosity": ("medium",), "web_search_options": (), "echo": (False,), "best_of": (1,),
    "add_special_tokens": (False,), "chat_template": (), "documents": ([],), "mm_processor_kwargs": (),
    "include_reasoning": (True,), "stream_reasoning": (True,),
}  # fmt: skip
COMPLETION_UNSUPPORTED: Neutral = {
    **SAMPLING_UNSUPPORTED, "suffix": ("",), "add_special_tokens": (True,), "prompt_embeds": ()
}  # fmt: skip
GENERATE_UNSUPPORTED: Neutral = {
    **ANY_UNSUPPORTED, "image_data": (), "audio_data": (), "video_data": (), "input_embeds": (),
    "token_ids_logprob": (), "return_routed_experts": (False,), "custom_logit_processor": (),
}  # fmt: skip
TOKENIZE_UNSUPPORTED: Neutral = {"chat_template": (), "mm_processor_kwargs": ()}
SGLANG_SAMPLING_UNSUPPORTED: Neutral = {
    "structural_tag": (), "spaces_between_special_tokens": (True,), "no_stop_trim": (False,), "stop_regex": (),
    "stream_interval": (), "custom_params": (),
}  # fmt: skip
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Count = Annotated[int, Meta(ge=0)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Priority = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
Seed = Annotated[int, Meta(extra_json_schema={"minimum": -(2**63), "exclusiveMaximum": 2**64})]
Unit = Annotated[float, Meta(ge=0, le=1)]
LogitBias = Annotated[
    dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=MAX_LOGIT_BIAS),
]
NON_EMPTY_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
TEXTS = [NON_EMPTY_TEXT, {"type": "array", "minItems": 1, "items": NON_EMPTY_TEXT}]
TOKEN_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
IDS = [TOKEN_IDS, {"type": "array", "minItems": 1, "items": TOKEN_IDS}]

EITHER = [
    {"required": [given], "properties": {given: {"not": NULL}, other: NULL}}
    for given, other in (("text", "input_ids"), ("input_ids", "text"))
]

Prompts = list[str | list[int]]


def parse_prompts(value: Any, param: str) -> Prompts:
    """Every prompt, a text or token ids; raises InvalidRequestError unless there is at least one and none is empty."""
    single = isinstance(value, str) or (is_list_of(int, value) and bool(value))
    several = is_list_of(str, value) or (isinstance(value, list) and all(is_list_of(int, item) for item in value))
    kinds = "a string, a list of strings, token ids or a list of lists of token ids"
    require(single or several, f"{param} must be {kinds}", param)
    require(value and (single or all(value)), f"{param} must not be empty", param)
    return [value] if single else value


def is_list_of(kind: type, value: object) -> bool:
    """Whether `value` is a list of exactly this type (a bool is no int)."""
    return isinstance(value, list) and all(type(item) is kind for item in value)


class StreamOptions(Body):
    """`include_usage`: a last chunk has the usage; `continuous_usage_stats`: then every chunk has it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(Body):
    """The sampling fields that every endpoint has under the same name."""

    n: Choices | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Unit | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None

    def sampling_params(self, **others: Any) -> SamplingParams:
        """The engine's parameters, not validated: `others`, and the given fields that the engine has too."""
        names = set(self.__struct_fields__) & set(SamplingParams.__struct_fields__) - others.keys()
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        given["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        given["stop_token_ids"] = tuple(self.stop_token_ids or ())
        given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(**given, **others)


class OpenAIRequest(Sampling):
    """What chats and completions share. `user` and the fields after it change nothing in the answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    seed: Seed | None = None
    min_tokens: Count | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Priority | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceTexts | None = None
    guided_grammar: GrammarText | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        if isinstance(outputs := value.get("structured_outputs"), dict):
            unknown = dict.fromkeys(outputs.keys() - set(StructuredOutputs.__struct_fields__), ())
            drop_unsupported(outputs, {**unknown, **StructuredOutputs.unsupported}, "structured_outputs.")

    def check(self) -> None:
        options = self.stream_options
        require(self.stream or options is None, "stream_options is only allowed with stream", "stream_options")
        plain = options is None or not options.include_obfuscation
        require(plain, "include_obfuscation must be false", "stream_options.include_obfuscation")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_generated(self) -> int:
        return self.num_choices

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def check_conversation(chat: ChatRequest | TokenizeConversation) -> None:
    """Raise InvalidRequestError for tools or a continued message that cannot be."""
    require(chat.messages, "messages must not be empty", "messages")
    for index, tool in enumerate(chat.tools or ()):
        kind = (tool.function.parameters or {}).get("type")
        param = f"tools.{index}.function.parameters"
        require(not isinstance(kind, str) or kind == "object", f"{param} must be the JSON schema of an object", param)
    for name in ("add_generation_prompt", "continue_final_message", "tools"):
        require(name not in (chat.chat_template_kwargs or {}), f"{name} is a field of its own", "chat_template_kwargs")
    if chat.continue_final_message:
        param, last = "continue_final_message", chat.messages[-1]
        require(not chat.add_generation_prompt, f"{param} and add_generation_prompt exclude each other", param)
        rule = f"{param} needs a last message of the assistant's, without tool calls"
        require(last.role == "assistant" and not last.tool_calls, rule, param)


class ChatRequest(OpenAIRequest, kw_only=True):
    """The body of /v1/chat/completions."""

    unsupported = CHAT_UNSUPPORTED

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        super().prepare(value)
        prepare_messages(value.get("messages"))

    def check(self) -> None:
        super().check()
        check_conversation(self)
        require(self.logprobs or not self.top_logprobs, "top_logprobs is only allowed with logprobs", "top_logprobs")
        require(self.tools or self.tool_choice in (None, "auto", "none"), "tool_choice needs tools", "tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        require(len(set(names)) == len(names), "two tools have the same name", "tools")
        named = self.named_tool
        require(named is None or named in names, f"tool_choice names {named!r}, which is no tool", "tool_choice")
        rule = "continue_final_message does not go with tools, unless tool_choice is none"
        require(not (self.offered_tools and self.continue_final_message), rule, "continue_final_message")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        require(len(limits) <= 1, "max_tokens and max_completion_tokens differ; give one", "max_tokens")

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call; none when `tool_choice` says so."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def named_tool(self) -> str | None:
        """The one function that must be called, if one is named."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or self.named_tool is not None

    def params(self, grammar: Grammar | None) -> SamplingParams:
        """The engine's parameters; without a limit the answer may be as long as the model allows."""
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens=limit, logprobs=logprobs, grammar=grammar)


class CompletionRequest(OpenAIRequest, kw_only=True):
    """The body of /v1/completions."""

    unsupported = COMPLETION_UNSUPPORTED

    prompt: Annotated[Any, Meta(extra_json_schema={"anyOf": TEXTS + IDS})]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: Choices | None = None

    @property
    def num_generated(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def scores_only(self) -> bool:
        """Whether only the prompt is wanted: `echo` with a `max_tokens` of 0."""
        return bool(self.echo) and self.max_tokens == 0

    def check(self) -> None:
        super().check()
        more = self.num_generated > self.num_choices
        require(self.num_generated >= self.num_choices, "best_of must be at least n", "best_of")
        require(not (more and self.stream), "best_of above n cannot be streamed: which is best shows last", "best_of")

    def params(self, grammar: Grammar | None) -> SamplingParams:
        """The engine's parameters. The best answers are found by their log-probabilities."""
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        limit = 1 if self.scores_only else limit  # the engine generates at least one
        logprobs = 0 if self.logprobs is None and self.num_generated > self.num_choices else self.logprobs
        prompt = self.logprobs if self.echo else None
        return self.sampling_params(max_tokens=limit, logprobs=logprobs, prompt_logprobs=prompt, grammar=grammar)


class SglangSampling(Sampling):
    """`sampling_params` of /generate."""

    unsupported = SGLANG_SAMPLING_UNSUPPORTED

    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_new_tokens: Count | None = None
    sampling_seed: Seed | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: GrammarText | None = None


class GenerateRequest(Body):
    """SGLang's /generate. `logprob_start_len` -1 gives no prompt log-probabilities, else those from there on."""

    unsupported = GENERATE_UNSUPPORTED
    rules: ClassVar[dict[str, Any]] = {"oneOf": EITHER}

    text: Annotated[Any, Meta(extra_json_schema={"anyOf": [*TEXTS, NULL]})] = None
    input_ids: Annotated[Any, Meta(extra_json_schema={"anyOf": [*IDS, NULL]})] = None
    sampling_params: SglangSampling | None = None
    stream: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Meta(ge=-1)] | None = None
    top_logprobs_num: Logprobs | None = None
    return_text_in_logprobs: bool | None = None
    priority: Priority | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        if isinstance(sampling := value.get("sampling_params"), dict):
            drop_unsupported(sampling, SGLANG_SAMPLING_UNSUPPORTED, "sampling_params.")

    def check(self) -> None:
        given = [name for name in ("text", "input_ids") if getattr(self, name) is not None]
        require(len(given) == 1, "give either text or input_ids", "text")
        nothing = {"logprob_start_len": -1, "top_logprobs_num": 0, "return_text_in_logprobs": False}
        for name, value in nothing.items():
            neutral = getattr(self, name) in (None, value)
            require(self.return_logprob or neutral, f"{name} is only allowed with return_logprob", name)

    @property
    def sampling(self) -> SglangSampling:
        return self.sampling_params or SglangSampling()

    @property
    def num_generated(self) -> int:
        return self.sampling.n or 1

    @property
    def prompts(self) -> Any:
        return self.input_ids if self.text is None else self.text

    @property
    def prompt_logprobs_from(self) -> int | None:
        """The prompt position from which log-probabilities are wanted, None for none."""
        start = self.logprob_start_len if self.return_logprob else None
        return None if start is None or start < 0 else start

    def params(self, grammar: Grammar | None) -> SamplingParams:
        """The engine's parameters."""
        sampling = self.sampling
        top = (self.top_logprobs_num or 0) if self.return_logprob else None
        return sampling.sampling_params(
            seed=sampling.sampling_seed,
            max_tokens=GENERATE_MAX_TOKENS if sampling.max_new_tokens is None else sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens or 0,
            logprobs=top,
            prompt_logprobs=None if self.prompt_logprobs_from is None else top,
            grammar=grammar,
        )


class TokenizeText(Body):
    """A text for vLLM's /tokenize; special tokens are added unless told otherwise."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeConversation(Body):
    """A conversation for /tokenize; its template writes the special tokens itself, more are added where told so."""

    unsupported = TOKENIZE_UNSUPPORTED

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> None:
        prepare_messages(value.get("messages"))

    def check(self) -> None:
        check_conversation(self)


class DetokenizeRequest(Body):
    """Token ids for vLLM's /detokenize."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None
