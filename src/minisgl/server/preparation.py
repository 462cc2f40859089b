"""From a request's body to the engine's requests: validate, render, tokenise, check. It may take seconds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from minisgl.config import Config
from minisgl.core.types import REASONING_END, REASONING_START, Grammar, ModelInfo, Request, SamplingParams
from minisgl.errors import InvalidRequestError, ModelNotFoundError, UnsupportedParameterError
from minisgl.server import protocol
from minisgl.server.engine_client import EngineClient
from minisgl.server.generate import GenerateRequest
from minisgl.server.protocol import ChatRequest, CompletionRequest, TokenizeConversation, require
from minisgl.server.responses import Detokenized, TokenizerInfo, Tokens
from minisgl.server.structured import forced_call_grammar, requested_grammar, text_without_calls, with_optional_calls
from minisgl.server.tools import ParserConfig, Reasoning, ToolFormat, detect_tool_format
from minisgl.text.tokenizer import Tokenizer

MAX_REPEATED = 2**22  # token ids that go to the engine with each of a body's requests

logger = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = str | list[int]
Generating = ChatRequest | CompletionRequest | GenerateRequest
Echo = tuple[str, list[int]]  # a prompt as text, and where in it the text of each of its tokens begins


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    body: Generating
    requests: list[Request]
    parser: ParserConfig | None = None  # None where completions are plain text
    echoes: Sequence[Echo] = ()  # each prompt that is to be shown


@dataclasses.dataclass
class Preparation:
    """One served model. Every method raises InvalidRequestError, and is safe to use from several threads."""

    model: ModelInfo
    tokenizer: Tokenizer
    max_live: int  # requests that one body may hold
    names: Sequence[str] = ()  # that requests may call the model
    check_grammar: Callable[[Grammar], None] | None = None  # raises for one that cannot be enforced; None: none can be

    def __post_init__(self) -> None:
        self.names = tuple(self.names) or (self.model.name,)
        template = self.tokenizer.tool_template
        self.tool_format = None if template is None else detect_tool_format(template.source, template.takes_tools)
        self.described_tools = False  # and said so in the log

    def chat(self, body: bytes) -> PreparedRequest:
        chat = ChatRequest.parse(body)
        self.check_model(chat.model)
        grammar, field = constraint_of(chat)
        prompt = self.render(chat, chat.offered_tools)
        template = self.tokenizer.template_for(bool(chat.offered_tools))
        reasons = template is not None and REASONING_END in template.source and chat.separate_reasoning is not False
        reasoning = reasoning_before(prompt, chat) if reasons else None
        tool_format = self.require_tool_format() if chat.offered_tools else None
        if chat.must_call and tool_format is not None:
            grammar, field, tool_format = forced_call_grammar(chat), "tools", tool_format.forced()
        elif tool_format is not None and (grammar is not None or tool_format.generic):
            field = field or "tools"
            grammar = with_optional_calls(grammar or text_without_calls(tool_format), chat, tool_format)
        if grammar is not None and reasoning is not None:
            grammar = msgspec.structs.replace(grammar, reasoning=reasoning)
        limit = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        with renamed({None: "messages", "prompt": "messages", "max_tokens": limit}):
            params = self.tokenizer.with_bad_words(chat.params(grammar))
            requests = self.requests("chatcmpl", chat, [self.tokenizer.encode(prompt, False)], [params])
        self.require_grammar(grammar, field)
        if tool_format is None and reasoning is None:
            return PreparedRequest(chat, requests)
        names = frozenset(tool.function.name for tool in chat.offered_tools)
        most = 1 if chat.parallel_tool_calls is False else None
        return PreparedRequest(chat, requests, ParserConfig(tool_format, names, most, reasoning))

    def completion(self, body: bytes) -> PreparedRequest:
        asked = CompletionRequest.parse(body)
        prompts = parse_prompts(asked.prompt, "prompt")
        self.check_model(asked.model)
        grammar, field = constraint_of(asked)
        with renamed({None: "prompt"}):
            params = self.tokenizer.with_bad_words(asked.params(grammar))
            requests = self.requests("cmpl", asked, prompts, [params] * len(prompts))
        self.require_grammar(grammar, field)
        firsts = requests[:: asked.num_generated]
        echoes = [self.echo(*entry) for entry in zip(prompts, firsts, strict=True)] if asked.echo else []
        return PreparedRequest(asked, requests, echoes=echoes)

    def generate(self, body: bytes) -> PreparedRequest:
        asked = GenerateRequest.parse(body)
        field = "text" if asked.text is not None else "input_ids"
        prompts = parse_prompts(asked.prompts, field)
        try:
            params = [asked.params(i, constraint_of(asked.sampling(i))[0]) for i in range(len(prompts))]
        except InvalidRequestError as error:
            error.param = "sampling_params"
            raise
        names: dict[str | None, str] = {name: f"sampling_params.{name}" for name in SamplingParams.__struct_fields__}
        names |= {"max_tokens": "sampling_params.max_new_tokens", "min_tokens": "sampling_params.min_new_tokens"}
        with renamed({**names, "seed": "sampling_params.sampling_seed", None: field, "prompt": field}):
            requests = self.requests("gen", asked, prompts, params)
        for grammar in dict.fromkeys(each.grammar for each in params):
            self.require_grammar(grammar, "sampling_params")
        for index, request in enumerate(requests):
            if (rid := asked.of_prompt("rid", index // asked.num_generated)) is not None:  # it need not be unique
                requests[index] = msgspec.structs.replace(request, id=f"{rid}-{uuid.uuid4().hex}")
        return PreparedRequest(asked, requests)

    def tokenize(self, body: bytes) -> Tokens:
        value = protocol.parse_object(body)
        asked: TokenizeConversation | protocol.TokenizeText
        if "messages" in value:
            asked = TokenizeConversation.parse(value)
            text, field, special = self.render(asked, asked.tools or ()), "messages", bool(asked.add_special_tokens)
        else:
            asked = protocol.TokenizeText.parse(value)
            text, field, special = asked.prompt, "prompt", asked.add_special_tokens is not False
        self.check_model(asked.model)
        with renamed({None: field}):
            ids = self.tokenizer.encode(text, special)
        names = [self.tokenizer.backend.id_to_token(token) for token in ids] if asked.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=self.model.max_seq_len, tokens=ids, token_strs=names)

    def detokenize(self, body: bytes) -> Detokenized:
        asked = protocol.DetokenizeRequest.parse(body)
        self.check_model(asked.model)
        last = self.model.vocab_size - 1
        if not all(0 <= token <= last for token in asked.tokens):
            raise InvalidRequestError(f"token ids must be between 0 and {last}", param="tokens")
        return Detokenized(self.tokenizer.decode(asked.tokens, bool(asked.skip_special_tokens)))

    def tokenizer_info(self) -> TokenizerInfo:
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens: dict[str, Any] = {name: self.tokenizer.tokens.get(name) for name in names}
        tokens["tokenizer_class"] = self.tokenizer.kind
        template = None if self.tokenizer.chat_template is None else self.tokenizer.chat_template.source
        size, length = self.model.vocab_size, self.model.max_seq_len
        return TokenizerInfo(**tokens, chat_template=template, vocab_size=size, model_max_length=length)

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for any other model than the one served; none named means that one."""
        if name not in (None, self.model.name, *self.names):
            raise ModelNotFoundError(f"the model {name!r} is not served here; {self.model.name!r} is", param="model")

    def echo(self, prompt: Prompt, request: Request) -> Echo:
        """A prompt as text, of ids with their special tokens; where its tokens begin is only needed to score them."""
        ids, params = request.prompt.tolist(), request.params
        if isinstance(prompt, str) and params.truncate_prompt_tokens is None:
            text = prompt
        else:
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text, [] if params.prompt_logprobs is None else self.tokenizer.starts(ids, text)

    def requests(
        self, kind: str, body: Generating, prompts: list[Prompt], params: Sequence[SamplingParams]
    ) -> list[Request]:
        """Checked requests with each prompt's parameters, those of one prompt in a row; their ids are the completion's
        id and an index. Without a seed each gets one of its own. With one the first of a prompt has it, the others what
        follows from it.
        """
        copies = body.num_generated
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        ids = [self.model.truncate(prompt, own) for prompt, own in zip(ids, params, strict=True)]
        for prompt, own in zip(ids, params, strict=True):
            self.model.check(prompt, own)
        field = "n" if copies > 1 else "prompt"
        require(len(ids) * copies <= self.max_live, f"at most {self.max_live} answers fit in one request", field)
        sizes = [len(own.allowed_token_ids or ()) + sum(map(len, own.bad_word_ids)) for own in params]
        rule = f"allowed_token_ids and bad_words of all answers may hold {MAX_REPEATED} tokens together"
        require(sum(sizes) * copies <= MAX_REPEATED, rule, "allowed_token_ids")
        requests: list[Request] = []
        base = f"{kind}-{uuid.uuid4().hex}"
        for prompt, own in zip(ids, params, strict=True):
            for copy in range(copies):
                seeded = msgspec.structs.replace(own, seed=nth_seed(own.seed, copy))
                name = f"{base}-{len(requests)}"
                requests.append(Request.make(id=name, prompt=prompt, params=seeded))
        return requests

    def require_tool_format(self) -> ToolFormat:
        """The format of tool calls; raises UnsupportedParameterError when the model has one that is not known."""
        if self.tokenizer.tool_template is None:
            raise UnsupportedParameterError("this model has no chat template, so no place for tools", param="tools")
        if self.tool_format is None:
            raise UnsupportedParameterError("this model's way of writing tool calls is not known here", param="tools")
        if self.tool_format.generic and self.check_grammar is None:
            reason = "the chat template has no place for tools, and this server has no grammar to form calls"
            raise UnsupportedParameterError(reason, param="tools")
        if self.tool_format.generic and not self.described_tools:
            self.described_tools = True
            logger.warning("the chat template has no place for tools: a system text lists them, a grammar forms calls")
        return self.tool_format

    def require_grammar(self, grammar: Grammar | None, param: str | None) -> None:
        """Raise for a grammar that cannot be enforced; the error names `param`, where the grammar comes from."""
        if grammar is None:
            return
        if self.check_grammar is None:
            raise UnsupportedParameterError("structured output is not available on this server", param=param)
        try:
            self.check_grammar(grammar)
        except InvalidRequestError as error:
            if error.param != "tools":
                error.param = param
            raise

    def render(self, chat: ChatRequest | TokenizeConversation, tools: Sequence[protocol.Tool]) -> str:
        variables: dict[str, Any] = dict(chat.chat_template_kwargs or {})
        if tools:
            self.require_tool_format()
            variables["tools"] = [tool.for_template() for tool in tools]
        if isinstance(chat, ChatRequest) and chat.reasoning_effort is not None:
            name, template = "reasoning_effort", self.tokenizer.template_for(bool(tools))
            if template is None or name not in template.variables:
                raise UnsupportedParameterError(f"this model's chat template does not know {name}", param=name)
            variables.setdefault(name, chat.reasoning_effort)
        messages = [message.for_template(f"messages.{index}") for index, message in enumerate(chat.messages)]
        with renamed({None: "messages"}):
            if chat.continue_final_message:
                return self.tokenizer.render_continued(messages, **variables)
            add = chat.add_generation_prompt is not False
            return self.tokenizer.render_chat(messages, add_generation_prompt=add, **variables)


@dataclasses.dataclass(frozen=True)
class Api:
    """What every endpoint works with."""

    client: EngineClient
    preparation: Preparation
    config: Config
    notes: Sequence[str]  # what the engine made of it
    folder: str  # of the model
    started: float  # s, on the monotonic clock
    health_timeout: float = 5.0  # s
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))  # Unix time, s

    async def prepare(self, prepare: Callable[[bytes], T], body: bytes) -> T:
        with self.client.metrics.preparing.track_inprogress():
            try:
                return await asyncio.to_thread(prepare, body)
            except RecursionError as error:
                raise InvalidRequestError("the body is nested too deeply") from error


def prioritize(prepared: PreparedRequest, allowed: tuple[int, int] | None) -> None:
    """Give the requests the priority that is asked for; raises outside the range, and ignores it without one."""
    priority = prepared.body.priority
    if priority is not None and allowed is not None:
        low, high = allowed
        require(low <= priority <= high, f"priority must be between {low} and {high}, got {priority}", "priority")
        prepared.requests[:] = [msgspec.structs.replace(request, priority=priority) for request in prepared.requests]


def parse_prompts(value: Any, param: str) -> list[Prompt]:
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


def constraint_of(body: protocol.Sampling) -> tuple[Grammar | None, str | None]:
    return requested_grammar(body.constraints) if body.constraints else (None, None)


@contextlib.contextmanager
def renamed(names: Mapping[str | None, str]) -> Iterator[None]:
    """Let errors name a field as the request does; None is the name for errors without one."""
    try:
        yield
    except InvalidRequestError as error:
        if (name := names.get(error.param)) is not None:
            if error.param not in (None, "prompt"):
                error.message = error.message.replace(error.param, name.rpartition(".")[2])
            error.param = name
        raise


def reasoning_before(prompt: str, chat: ChatRequest) -> Reasoning:
    """Whether a completion may begin with reasoning; the prompt or the message that it continues may have begun it."""
    if chat.continue_final_message:
        last = chat.messages[-1].text
        return "begun" if last.rfind(REASONING_START) > last.rfind(REASONING_END) else "none"
    if chat.add_generation_prompt is False:
        return "none"
    if prompt.rstrip().endswith(REASONING_START):
        return "begun"
    return "none" if prompt.rstrip().endswith(REASONING_END) else "possible"


def nth_seed(seed: int | None, n: int) -> int:
    """The seed of the n-th choice of a prompt: the given one, then SplitMix64's (Steele et al. 2014) steps from it."""
    if seed is None:
        return secrets.randbits(63)
    if n == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + n * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) >> 1
