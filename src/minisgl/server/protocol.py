"""Request bodies: what they are made of, what is refused by name, how they become `SamplingParams` and grammars."""

import functools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import msgspec
from msgspec import Meta

from minisgl.core.types import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_LOGPROBS, Grammar, SamplingParams
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.text.json_schema import rewritten

COMPLETION_MAX_TOKENS = 16  # the default of max_tokens in /v1/completions
MAX_CHOICES = 128
MAX_EXACT = 2**53  # up to here every integer is a double of its own
MAX_MESSAGES = 16384

# Fields of OpenAI, vLLM and SGLang (their API documentation) that are known and not supported, each with the values
# that ask for nothing; null always does.
Unsupported = Mapping[str, tuple[Any, ...]]
ANY_UNSUPPORTED: Unsupported = {"return_hidden_states": (False,), "lora_path": (), "session_params": ()}
OPENAI_UNSUPPORTED: Unsupported = {
    **ANY_UNSUPPORTED, "service_tier": ("auto", "default"), "use_beam_search": (False,), "length_penalty": (1,),
    "spaces_between_special_tokens": (True,), "logits_processors": (), "guided_decoding_backend": (),
    "guided_whitespace_pattern": (), "stop_regex": (), "request_id": (), "rid": (), "cache_salt": (),
    "kv_transfer_params": (), "vllm_xargs": (),
}  # fmt: skip
# Fields of every endpoint that ask for structured output, and what kind of grammar they hold.
GRAMMAR_KINDS: Mapping[str, Literal["json_schema", "regex", "choice", "lark"]] = {
    "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "lark",
    "json_schema": "json_schema", "regex": "regex", "ebnf": "lark",
}  # fmt: skip

# JSON schemas of prompts, which are checked here, not by msgspec.
TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
IDS_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
TEXTS = [TEXT_SCHEMA, {"type": "array", "minItems": 1, "items": TEXT_SCHEMA}]
IDS = [IDS_SCHEMA, {"type": "array", "minItems": 1, "items": IDS_SCHEMA}]

NonEmpty = Annotated[str, Meta(min_length=1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Count = Annotated[int, Meta(ge=0)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Priority = Annotated[int, Meta(ge=-(2**31), lt=2**31)]
Seed = Annotated[int, Meta(extra_json_schema={"minimum": -(2**63), "exclusiveMaximum": 2**64})]
TokenKey = Annotated[str, Meta(pattern="^[0-9]{1,9}$")]
LogitBias = Annotated[dict[TokenKey, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)]
JsonSchema = dict[str, Any] | bool
GrammarText = Annotated[str, Meta(pattern=r"\S")]
ChoiceTexts = Annotated[list[NonEmpty], Meta(min_length=1)]


def require(condition: object, message: str, param: str | None) -> None:
    if not condition:
        raise InvalidRequestError(message, param=param)


def parse_object(body: bytes, values: Any = Any) -> dict[str, Any]:
    """The object that a body is, with `values` of this type."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(body, type=dict[str, values])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # RecursionError: nested too deeply
        raise InvalidRequestError(f"the body must be a JSON object in UTF-8: {error}", code="invalid_json") from error
    return fields


def invalid_field(error: str) -> InvalidRequestError:
    """The error for a complaint of msgspec, with the field as the user wrote it: `messages.0.role`."""
    found = re.fullmatch(r"(.*?)(?: - at (?:`key` in )?`\$([^`]*)`)?", error, re.DOTALL)
    assert found is not None
    # Keys of maps are the user's: the error names the map.
    param = re.sub(r"\[(\d+)\]", r".\1", (found[2] or "").partition("[...]")[0]).lstrip(".")
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", found[1], re.DOTALL):
        param = ".".join(filter(None, (param, named[2])))
        if named[1] == "missing required":
            return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
        return InvalidRequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    text = re.sub(r"Expected `\w+` of length <= (\d+)", r"at most \1 characters or items are allowed", found[1])
    return InvalidRequestError(f"{param}: {text}", param=param or None)


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An object of a request. Values keep their JSON type ("5" is no number); an unknown field must be null."""

    unsupported: ClassVar[Unsupported] = {}

    @classmethod
    def parse(cls, body: bytes | dict[str, Any]) -> Self:
        """Validate a body, or the object in it, which is changed; raises InvalidRequestError naming the field."""
        value = parse_object(body) if isinstance(body, bytes) else body
        cls.tidy(value)
        try:
            parsed = msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise invalid_field(str(error)) from error
        parsed.check()
        return parsed

    @classmethod
    def tidy(cls, value: dict[str, Any], where: str = "") -> None:
        """Remove what asks for nothing, here and in the parts; raises UnsupportedParameterError for what is asked in
        vain. Make 3.0 an integer, as JSON Schema does; not in lists, where numbers are token ids.
        """
        for name, item in list(value.items()):
            if name in cls.unsupported:
                neutral = (None, *cls.unsupported[name])
                if not any(item == ok and isinstance(item, bool) == isinstance(ok, bool) for ok in neutral):
                    raise UnsupportedParameterError(f"{where}{name} is not supported", param=where + name)
                del value[name]
            elif item is None and name not in cls.__struct_encode_fields__:
                del value[name]
            elif isinstance(item, float) and item.is_integer() and abs(item) <= MAX_EXACT:
                value[name] = int(item)
        for name, part in parts_of(cls).items():
            found = value.get(name)
            for index, item in enumerate(found if isinstance(found, list) else [found]):
                if isinstance(item, dict):
                    part.tidy(item, f"{where}{name}.{index}." if isinstance(found, list) else f"{where}{name}.")

    def check(self) -> None:
        """Raise InvalidRequestError for fields that do not go together."""


@functools.cache
def parts_of(kind: type[Body]) -> Mapping[str, type[Body]]:
    return {field.encode_name: part for field in msgspec.structs.fields(kind) for part in bodies_in(field.type)}


def bodies_in(kind: Any) -> list[type[Body]]:
    if isinstance(kind, type) and issubclass(kind, Body):
        return [kind]
    return [part for inner in get_args(kind) for part in bodies_in(inner)]


def make_grammar(field: str, value: Any) -> Grammar:
    source = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Grammar(kind=GRAMMAR_KINDS[field], source=source)


class JsonSchemaFormat(Body):
    schema: JsonSchema
    name: Annotated[str, Meta(min_length=1, max_length=64)] = "answer"
    description: str | None = None
    strict: bool | None = None  # false: keywords that cannot be followed are left out


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def to_grammar(self) -> Grammar | None:
        param, asked = "response_format", self.json_schema
        plain = self.type != "json_schema"
        require(plain == (asked is None), f"{param} has a json_schema where its type says so", f"{param}.json_schema")
        if asked is None:
            return None if self.type == "text" else Grammar(kind="json_object")
        schema = rewritten(asked.schema, lenient=True) if asked.strict is False else asked.schema
        return make_grammar("json_schema", schema)


class StructuredOutputs(Body):
    """vLLM's structured output: exactly one of these, or only the option beside another field's."""

    unsupported = {
        "disable_fallback": (False,), "disable_additional_properties": (False,), "whitespace_pattern": (),
        "structural_tag": (),
    }  # fmt: skip

    json: str | JsonSchema | None = None
    regex: str | None = None
    choice: ChoiceTexts | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None

    @property
    def constraints(self) -> list[str]:
        names = (name for name in self.__struct_fields__ if name != "disable_any_whitespace")
        return [name for name in names if getattr(self, name) is not None]

    def to_grammar(self) -> Grammar:
        given, param = self.constraints, "structured_outputs.json_object"
        require(len(given) == 1, "structured_outputs must hold exactly one constraint", "structured_outputs")
        require(self.json_object is not False, f"{param} must be true", param)
        if self.json_object:
            return Grammar(kind="json_object")
        return make_grammar(f"guided_{given[0]}", getattr(self, given[0]))


class TextPart(Body, forbid_unknown_fields=False):
    type: Literal["text"]
    text: str


class CalledFunction(Body, forbid_unknown_fields=False):
    name: str
    arguments: str  # JSON, but of an answer that was cut the beginning only


class MessageToolCall(Body, kw_only=True, forbid_unknown_fields=False):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body, forbid_unknown_fields=False):
    """`developer` is OpenAI's newer word for `system`, which templates know. What clients keep in messages and their
    parts for themselves (`parsed`) or for other servers (`cache_control`) is ignored.
    """

    unsupported = {"refusal": (), "annotations": ([],), "audio": (), "function_call": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @classmethod
    def tidy(cls, value: dict[str, Any], where: str = "") -> None:
        super().tidy(value, where)
        if value.get("role") == "function":
            text = "the function role is not supported: use tools and the tool role"
            raise UnsupportedParameterError(text, param=f"{where}role")
        parts = value.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UnsupportedParameterError(f"content of type {kind!r} is not supported", param=f"{where}content")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content or ())

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as chat templates take it; raises InvalidRequestError for what its role cannot have."""
        assistant, tool = self.role == "assistant", self.role == "tool"
        require(assistant or self.content is not None, f"{where}.content is required", f"{where}.content")
        rule = "tool messages, and only they, name the call they answer: tool_call_id"
        require(tool == (self.tool_call_id is not None), rule, f"{where}.tool_call_id")
        for name in ("tool_calls", "reasoning_content"):
            require(assistant or not getattr(self, name), f"{name} belongs to assistant messages", f"{where}.{name}")
        given = {name: value for name, value in msgspec.to_builtins(self).items() if value not in (None, [])}
        return given | {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class ToolFunction(Body):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; without one there are no arguments
    strict: bool | None = None
    cache_control: Any = None  # of clients that cache prompts elsewhere


class Tool(Body):
    type: Literal["function"]
    function: ToolFunction
    cache_control: Any = None

    def for_template(self) -> dict[str, Any]:
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        shown = {"name": function.name, "description": function.description or "", "parameters": parameters}
        return {"type": "function", "function": shown}


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


Messages = Annotated[list[Message], Meta(max_length=MAX_MESSAGES, extra_json_schema={"minItems": 1})]
Tools = Annotated[list[Tool], Meta(max_length=128)]


class StreamOptions(Body):
    """`include_usage`: a last chunk has the usage; `continuous_usage_stats`: then every chunk has it."""

    unsupported = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Body):
    n: Choices | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    no_stop_trim: bool | None = None  # SGLang's word for vLLM's include_stop_str_in_output
    json_schema: str | JsonSchema | None = None
    regex: str | None = None
    ebnf: GrammarText | None = None

    @property
    def num_generated(self) -> int:
        return self.n or 1

    def requested_grammar(self) -> tuple[Grammar | None, str | None]:
        """The grammar that is asked for, not checked, and the field that does; (None, None) for plain text."""
        names = ("response_format", "structured_outputs", *GRAMMAR_KINDS)
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        outputs = given.get("structured_outputs", StructuredOutputs())
        compact = outputs.disable_any_whitespace is True
        if compact and len(given) > 1 and not outputs.constraints:  # only an option of what another field asks for
            del given["structured_outputs"]
        found: dict[str, Grammar] = {}
        for name, value in given.items():
            nested = isinstance(value, (ResponseFormat, StructuredOutputs))
            grammar = value.to_grammar() if nested else make_grammar(name, value)
            if grammar is not None:
                found[name] = grammar
        fields = list(found)
        if len(fields) > 1:
            raise InvalidRequestError(f"{' and '.join(fields)} exclude each other", param=fields[1])
        return (msgspec.structs.replace(found[fields[0]], compact=compact), fields[0]) if fields else (None, None)

    def sampling_params(self, **others: Any) -> SamplingParams:
        """The engine's parameters, not validated: `others`, and the given fields that the engine has too."""
        names = set(self.__struct_fields__) & set(SamplingParams.__struct_fields__) - others.keys()
        fields = ((name, getattr(self, name)) for name in names)
        given: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in fields if x is not None}
        given["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        if self.no_stop_trim:
            given["include_stop_str_in_output"] = True
        return SamplingParams(**given, **others)


class OpenAIRequest(Sampling):
    """What chats and completions share. `user` and the fields after it change nothing in the answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    seed: Seed | None = None
    min_tokens: Count | None = None
    prompt_logprobs: Logprobs | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: Annotated[list[StopText], Meta(max_length=MAX_BAD_WORDS)] | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    return_token_ids: bool | None = None
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

    def check(self) -> None:
        alone = not self.stream and self.stream_options is not None
        require(not alone, "stream_options is only allowed with stream", "stream_options")
        whole = not self.stream or self.prompt_logprobs is None
        require(whole, "prompt_logprobs cannot be streamed", "prompt_logprobs")


def check_conversation(chat: "ChatRequest | TokenizeConversation") -> None:
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
    unsupported = {
        **OPENAI_UNSUPPORTED, "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],),
        "audio": (), "prediction": (), "verbosity": ("medium",), "web_search_options": (), "echo": (False,),
        "best_of": (1,), "add_special_tokens": (False,), "chat_template": (), "documents": ([],),
        "mm_processor_kwargs": (), "include_reasoning": (True,), "stream_reasoning": (True,),
    }  # fmt: skip

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
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    def params(self, grammar: Grammar | None) -> SamplingParams:
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens=limit, logprobs=logprobs, grammar=grammar)


class CompletionRequest(OpenAIRequest, kw_only=True):
    unsupported = {**OPENAI_UNSUPPORTED, "suffix": ("",), "add_special_tokens": (True,), "prompt_embeds": ()}

    prompt: Annotated[Any, Meta(extra_json_schema={"anyOf": TEXTS + IDS})]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: Choices | None = None

    @property
    def num_generated(self) -> int:
        return self.best_of or self.n or 1

    @property
    def scores_only(self) -> bool:
        return self.max_tokens == 0 and (bool(self.echo) or self.prompt_logprobs is not None)

    def check(self) -> None:
        super().check()
        returned = self.n or 1
        require(self.num_generated >= returned, "best_of must be at least n", "best_of")
        rule = "best_of above n cannot be streamed: which is best shows last"
        require(self.num_generated == returned or not self.stream, rule, "best_of")

    def params(self, grammar: Grammar | None) -> SamplingParams:
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        limit = 1 if self.scores_only else limit  # the engine generates at least one
        logprobs = self.logprobs
        if logprobs is None and self.num_generated > (self.n or 1):
            logprobs = 0  # they say which choices are best
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        prompt = max((most for most in asked if most is not None), default=None)
        return self.sampling_params(max_tokens=limit, logprobs=logprobs, prompt_logprobs=prompt, grammar=grammar)


class TokenizeOptions(Body):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeText(TokenizeOptions, kw_only=True):
    """A text for vLLM's /tokenize; special tokens are added unless told otherwise."""

    prompt: str


class TokenizeConversation(TokenizeOptions, kw_only=True):
    """A conversation for /tokenize; its template writes the special tokens itself, more are added where told so."""

    unsupported = {"chat_template": (), "mm_processor_kwargs": ()}

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        check_conversation(self)


class AbortOrder(Body):
    rid: str | None = None  # the id of a completion
    abort_all: bool | None = None

    def check(self) -> None:
        require(bool(self.rid) != bool(self.abort_all), "give the answer's id as rid, or abort_all", "rid")


class DetokenizeRequest(Body):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None
