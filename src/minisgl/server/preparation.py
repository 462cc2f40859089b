"""From a request's body to the engine's requests: validate, render, tokenise, check. It may take seconds."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from minisgl.core.types import CLOSE_THOUGHT, OPEN_THOUGHT, Grammar, ModelInfo, Request, SamplingParams
from minisgl.errors import InvalidRequestError, ModelNotFoundError, UnsupportedParameterError
from minisgl.server.engine_client import EngineClient
from minisgl.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeConversation,
    TokenizeText,
    parse_prompts,
)
from minisgl.server.responses import Detokenized, TokenizerInfo, Tokens
from minisgl.server.structured import forced_call_grammar, requested_grammar, with_optional_calls
from minisgl.server.tools import ParserConfig, ToolFormat, detect_tool_format
from minisgl.server.validation import Tool, parse_object
from minisgl.text.tokenizer import Tokenizer

T = TypeVar("T")
TEXT_ONLY = ParserConfig()

Echo = tuple[str, list[int]]
"""A prompt as text, and where in it the text of each of its tokens begins, in characters."""


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A valid body and its requests for the engine; `echoes` has each prompt that is to be shown."""

    body: ChatRequest | CompletionRequest | GenerateRequest
    requests: list[Request]
    parser: ParserConfig = TEXT_ONLY
    echoes: Sequence[Echo] = ()


class Preparation:
    """One served model, the `names` that requests may call it, and how many requests one body may hold.

    `check_grammar` raises InvalidRequestError for a grammar that cannot be enforced; without it none can be. Every
    method raises InvalidRequestError. Safe to use from several threads.
    """

    def __init__(
        self,
        model: ModelInfo,
        tokenizer: Tokenizer,
        max_live: int,
        names: Sequence[str] = (),
        check_grammar: Callable[[Grammar], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_live = max_live
        self.names = tuple(names) or (model.name,)
        self.check_grammar = check_grammar
        template = tokenizer.chat_template
        self.template_variables = frozenset[str]() if template is None else template.variables
        source = "" if template is None else template.source
        self.tool_format = detect_tool_format(source, "tools" in self.template_variables)
        self.reasons = CLOSE_THOUGHT in source

    def chat(self, body: bytes) -> PreparedRequest:
        """A request to /v1/chat/completions."""
        chat = ChatRequest.parse(body)
        self.check_model(chat.model)
        grammar, field = requested_grammar(chat)
        prompt = self.render(chat, chat.offered_tools)
        parser = self.parser_config(chat, prompt)
        if chat.must_call:
            grammar, field = forced_call_grammar(chat), "tools"
        elif grammar is not None and parser.tool_format is not None:
            grammar = with_optional_calls(grammar, chat, parser.tool_format)
        if grammar is not None and parser.reasoning:
            grammar = msgspec.structs.replace(grammar, thought=reasoning_before(prompt, chat))
        limit = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        with renamed({None: "messages", "prompt": "messages", "max_tokens": limit}):
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            requests = self.requests("chatcmpl", [ids], chat.params(grammar), chat.num_generated, chat.priority)
        self.require_grammar(grammar, field)
        return PreparedRequest(chat, requests, parser)

    def completion(self, body: bytes) -> PreparedRequest:
        """A request to /v1/completions, with the prompts to be echoed."""
        completion = CompletionRequest.parse(body)
        prompts = parse_prompts(completion.prompt, "prompt")
        self.check_model(completion.model)
        grammar, field = requested_grammar(completion)
        params = completion.params(grammar)
        with renamed({None: "prompt"}):
            ids = self.encode(prompts)
            requests = self.requests("cmpl", ids, params, completion.num_generated, completion.priority)
        self.require_grammar(grammar, field)
        echoes = [self.echo(*entry, params) for entry in zip(prompts, ids, strict=True)] if completion.echo else []
        return PreparedRequest(completion, requests, echoes=echoes)

    def generate(self, body: bytes) -> PreparedRequest:
        """A request to /generate."""
        asked = GenerateRequest.parse(body)
        field = "text" if asked.text is not None else "input_ids"
        prompts = parse_prompts(asked.prompts, field)
        try:
            grammar, _ = requested_grammar(asked.sampling)
        except InvalidRequestError as error:
            error.param = "sampling_params"
            raise
        names: dict[str | None, str] = {name: f"sampling_params.{name}" for name in SamplingParams.__struct_fields__}
        names |= {"max_tokens": "sampling_params.max_new_tokens", "min_tokens": "sampling_params.min_new_tokens"}
        with renamed({**names, "seed": "sampling_params.sampling_seed", None: field, "prompt": field}):
            ids = self.encode(prompts)
            requests = self.requests("gen", ids, asked.params(grammar), asked.num_generated, asked.priority)
        self.require_grammar(grammar, "sampling_params")
        return PreparedRequest(asked, requests)

    def tokenize(self, body: bytes) -> Tokens:
        """The tokens of a text or of a conversation."""
        value = parse_object(body)
        asked: TokenizeConversation | TokenizeText
        if "messages" in value:
            asked = TokenizeConversation.parse(value)
            text, field, special = self.render(asked, asked.tools or ()), "messages", bool(asked.add_special_tokens)
        else:
            asked = TokenizeText.parse(value)
            text, field, special = asked.prompt, "prompt", asked.add_special_tokens is not False
        self.check_model(asked.model)
        with renamed({None: field}):
            ids = self.tokenizer.encode(text, special)
        names = [self.tokenizer.backend.id_to_token(token) for token in ids] if asked.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=self.model.max_seq_len, tokens=ids, token_strs=names)

    def detokenize(self, body: bytes) -> Detokenized:
        """The text of tokens."""
        asked = DetokenizeRequest.parse(body)
        self.check_model(asked.model)
        last = self.model.vocab_size - 1
        if not all(0 <= token <= last for token in asked.tokens):
            raise InvalidRequestError(f"token ids must be between 0 and {last}", param="tokens")
        return Detokenized(self.tokenizer.decode(asked.tokens, bool(asked.skip_special_tokens)))

    def tokenizer_info(self) -> TokenizerInfo:
        """The tokenizer, as its configuration file names things."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        template = self.tokenizer.chat_template
        return TokenizerInfo(
            **{name: self.tokenizer.tokens.get(name) for name in names},
            chat_template=None if template is None else template.source,
            vocab_size=self.model.vocab_size,
            model_max_length=self.model.max_seq_len,
        )

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for any other model than the one served; none named means that one."""
        if name not in (None, self.model.name, *self.names):
            raise ModelNotFoundError(f"the model {name!r} is not served here; {self.model.name!r} is", param="model")

    def encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of every prompt, with BOS where the tokenizer adds one to a text."""
        return [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def echo(self, prompt: str | list[int], ids: list[int], params: SamplingParams) -> Echo:
        """A prompt as text; where its tokens begin is only needed where they are scored."""
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, params.skip_special_tokens)
        return text, [] if params.prompt_logprobs is None else self.tokenizer.starts(ids, text)

    def requests(
        self, kind: str, prompts: Sequence[list[int]], params: SamplingParams, copies: int, priority: int | None
    ) -> list[Request]:
        """Checked requests, `copies` of each prompt in a row; their ids are the answer's id and an index.

        Without a seed each gets one of its own. With one the first copy has it, the others what follows from it.
        """
        base = f"{kind}-{uuid.uuid4().hex}"
        for prompt in prompts:
            self.model.check(prompt, params)
        if len(prompts) * copies > self.max_live:
            raise InvalidRequestError(
                f"at most {self.max_live} answers fit in one request", param="n" if copies > 1 else "prompt"
            )
        return [
            Request.make(
                id=f"{base}-{index * copies + copy}",
                prompt=prompt,
                params=msgspec.structs.replace(params, seed=nth_seed(params.seed, copy)),
                priority=priority or 0,
            )
            for index, prompt in enumerate(prompts)
            for copy in range(copies)
        ]

    def require_tool_format(self) -> ToolFormat:
        """The model's own format of tool calls; raises UnsupportedParameterError when it has none that is known."""
        takes_tools = "tools" in self.template_variables
        require_supported(takes_tools, "this model's chat template has no place for tools", "tools")
        if self.tool_format is None:
            raise UnsupportedParameterError("this model's way of writing tool calls is not known here", param="tools")
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

    def render(self, chat: ChatRequest | TokenizeConversation, tools: Sequence[Tool]) -> str:
        """The text of a conversation."""
        variables: dict[str, Any] = dict(chat.chat_template_kwargs or {})
        if tools:
            self.require_tool_format()
            variables["tools"] = [tool.for_template() for tool in tools]
        if isinstance(chat, ChatRequest) and chat.reasoning_effort is not None:
            known = "reasoning_effort" in self.template_variables
            require_supported(known, "this model's chat template does not know reasoning_effort", "reasoning_effort")
            variables.setdefault("reasoning_effort", chat.reasoning_effort)
        messages = [message.for_template(f"messages.{index}") for index, message in enumerate(chat.messages)]
        with renamed({None: "messages"}):
            if chat.continue_final_message:
                return self.tokenizer.render_continued(messages, **variables)
            add = chat.add_generation_prompt is not False
            return self.tokenizer.render_chat(messages, add_generation_prompt=add, **variables)

    def parser_config(self, chat: ChatRequest, prompt: str) -> ParserConfig:
        """How the answers to a chat are parsed."""
        reasoning = self.reasons and chat.separate_reasoning is not False
        begun = reasoning and reasoning_before(prompt, chat) == "begun"
        if not chat.offered_tools:
            return ParserConfig(reasoning=reasoning, reasoning_begun=begun)
        tool_format = self.require_tool_format()
        return ParserConfig(
            tool_format=tool_format.forced() if chat.must_call else tool_format,
            names=frozenset(tool.function.name for tool in chat.offered_tools),
            max_calls=1 if chat.parallel_tool_calls is False else None,
            reasoning=reasoning,
            reasoning_begun=begun,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Api:
    """What every endpoint works with. `created` is a Unix time in s, `health_timeout` in s."""

    service: EngineClient
    preparation: Preparation
    health_timeout: float = 5.0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def prepare(self, prepare: Callable[[bytes], T], body: bytes) -> T:
        """Call a method of the preparation in a thread."""
        with self.service.metrics.preparing.track_inprogress():
            try:
                return await asyncio.to_thread(prepare, body)
            except RecursionError as error:
                raise InvalidRequestError("the body is nested too deeply") from error


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


def reasoning_before(prompt: str, chat: ChatRequest) -> Literal["none", "possible", "begun"]:
    """Whether an answer may begin with reasoning; the prompt or the message that it continues may have begun it."""
    if chat.continue_final_message:
        last = chat.messages[-1].text
        return "begun" if last.rfind(OPEN_THOUGHT) > last.rfind(CLOSE_THOUGHT) else "none"
    if chat.add_generation_prompt is False:
        return "none"
    if prompt.rstrip().endswith(OPEN_THOUGHT):
        return "begun"
    return "none" if prompt.rstrip().endswith(CLOSE_THOUGHT) else "possible"


def require_supported(condition: bool, message: str, param: str | None) -> None:
    if not condition:
        raise UnsupportedParameterError(message, param=param)


def nth_seed(seed: int | None, n: int) -> int:
    """The seed of the n-th answer to a prompt: the given one, then SplitMix64's (Steele et al. 2014) steps from it."""
    if seed is None:
        return secrets.randbits(63)
    if n == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + n * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) >> 1
