"""What every endpoint works with, and the work that is done off the event loop: parse, render, tokenise, check."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from minisgl.errors import InvalidRequestError, ModelNotFoundError, UnsupportedParameterError
from minisgl.server.callforms import forced
from minisgl.server.forcedcalls import forced_grammar
from minisgl.server.native import GenerateRequest, native_names
from minisgl.server.prompts import Template, begins_in_thought, render
from minisgl.server.protocol import ChatRequest, CompletionRequest, check_structured_with_tools
from minisgl.server.reading import Reading
from minisgl.server.service import EngineService
from minisgl.server.structured import grammar_from_request
from minisgl.server.text_answer import Echo
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import Grammar, ModelInfo, Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Api:
    """One served model, and further `names` for it. `created` is a Unix time in s, `health_timeout` in s.

    `check_grammar` raises InvalidRequestError for a grammar that cannot be enforced; without it none can be.
    """

    service: EngineService
    model: ModelInfo
    tokenizer: Tokenizer
    health_timeout: float = 5.0
    names: tuple[str, ...] = ()
    check_grammar: Callable[[Grammar], None] | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def template(self) -> Template:
        """What the model's chat template knows."""
        return Template.of(self.tokenizer)

    def prepare_chat(self, body: bytes) -> tuple[ChatRequest, list[Request], Reading]:
        """A chat request, what goes to the engine for it, and how to read the answers; raises InvalidRequestError."""
        chat = ChatRequest.parse(body)
        chat.check()
        self.check_model(chat.model)
        grammar = grammar_from_request(chat.structured)
        check_structured_with_tools(chat, grammar)
        if chat.must_call:
            grammar = forced_grammar(chat)
        params = chat.params(self.checked(grammar, "tools" if chat.must_call else field_of(chat.structured)))
        prompt = render(self.tokenizer, self.template, chat, chat.offered_tools)
        reading = self.reading(chat, prompt, grammar)
        try:
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            with chat.named_limit():
                requests = self.requests("chatcmpl", [ids], params, chat.num_choices, chat.priority)
        except InvalidRequestError as error:
            if error.param in (None, "prompt"):
                error.param = "messages"
            raise
        return chat, requests, reading

    def reading(self, chat: ChatRequest, prompt: str, grammar: Grammar | None) -> Reading:
        """How the answers to a chat are read. A grammar leaves no room for reasoning before its text."""
        thinks = self.template.thinks and chat.separate_reasoning is not False and grammar is None
        in_thought = thinks and begins_in_thought(prompt, chat)
        if not chat.offered_tools:
            return Reading(thinks=thinks, in_thought=in_thought)
        form = self.template.check_tools()
        return Reading(
            form=forced(form) if chat.must_call else form,
            names=frozenset(tool.function.name for tool in chat.offered_tools),
            limit=1 if chat.parallel_tool_calls is False else None,
            thinks=thinks,
            in_thought=in_thought,
        )

    def prepare_completion(self, body: bytes) -> tuple[CompletionRequest, list[Request], list[Echo]]:
        """A completion request, what goes to the engine for it, and the prompts to be echoed.

        Raises InvalidRequestError.
        """
        completion = CompletionRequest.parse(body)
        completion.check()
        self.check_model(completion.model)
        params = completion.params(
            self.checked(grammar_from_request(completion.structured), field_of(completion.structured))
        )
        prompts = completion.prompts()
        try:
            ids = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
            requests = self.requests("cmpl", ids, params, completion.drawn, completion.priority)
        except InvalidRequestError as error:
            error.param = error.param or "prompt"
            raise
        if not completion.echo:
            return completion, requests, []
        texts = [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, params.skip_special_tokens)
            for prompt in prompts
        ]
        scored = params.prompt_logprobs is not None
        return (
            completion,
            requests,
            [
                Echo(text, self.tokenizer.starts(tokens, text) if scored else ())
                for text, tokens in zip(texts, ids, strict=True)
            ],
        )

    def prepare_generate(self, body: bytes) -> tuple[GenerateRequest, list[Request]]:
        """A request to /generate and what goes to the engine for it; raises InvalidRequestError."""
        asked = GenerateRequest.parse(body)
        asked.check()
        structured = asked.sampling.structured
        try:
            grammar = grammar_from_request(structured)
        except InvalidRequestError as error:
            error.param = "sampling_params"
            raise
        params = asked.params(self.checked(grammar, "sampling_params"))
        field = "text" if asked.text is not None else "input_ids"
        try:
            ids = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in asked.prompts()]
            return asked, self.requests("gen", ids, params, asked.num_choices, asked.priority)
        except InvalidRequestError as error:
            if error.param in (None, "prompt"):
                error.param = field
            raise native_names(error) from error

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for any other model than the one served; none named means that one."""
        if name is not None and name != self.model.name and name not in self.names:
            raise ModelNotFoundError(f"the model {name!r} is not served here; {self.model.name!r} is", param="model")

    def checked(self, grammar: Grammar | None, param: str | None) -> Grammar | None:
        """The grammar, which can be enforced; errors name `param`, the field that it comes from."""
        if grammar is None:
            return None
        if self.check_grammar is None:
            raise UnsupportedParameterError("structured output is not available on this server", param=param)
        try:
            self.check_grammar(grammar)
        except InvalidRequestError as error:
            error.param = param
            raise
        return grammar

    def requests(
        self, kind: str, prompts: Sequence[list[int]], params: SamplingParams, copies: int, priority: int | None
    ) -> list[Request]:
        """Checked requests, `copies` of each prompt in a row; their ids are the answer's id and an index.

        Without a seed each gets one of its own. With one the first copy has it, the others what follows from it.
        """
        base = f"{kind}-{uuid.uuid4().hex}"
        for prompt in prompts:
            self.model.check(prompt, params)
        if len(prompts) * copies > self.service.max_live:
            raise InvalidRequestError(
                f"at most {self.service.max_live} answers fit in one request", param="n" if copies > 1 else "prompt"
            )
        return [
            Request(
                id=f"{base}-{index * copies + copy}",
                prompt=prompt,
                params=msgspec.structs.replace(params, seed=nth_seed(params.seed, copy)),
                priority=priority or 0,
            )
            for index, prompt in enumerate(prompts)
            for copy in range(copies)
        ]


def field_of(structured: Mapping[str, Any]) -> str | None:
    """The field that asks for a form of the answer; there is at most one that is not about plain text."""
    return next((name for name, value in structured.items() if value != {"type": "text"}), None)


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
