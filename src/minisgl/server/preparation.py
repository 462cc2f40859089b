"""From the body of a request to what the engine gets: parse, render, tokenise, check. It may take seconds."""

from __future__ import annotations

import functools
import secrets
import uuid
from collections.abc import Sequence
from typing import assert_never

import msgspec

from minisgl.core.types import ModelInfo, Request, SamplingParams
from minisgl.errors import InvalidRequestError, ModelNotFoundError
from minisgl.server.callforms import forced
from minisgl.server.forcedcalls import forced_grammar, optional_calls
from minisgl.server.native import GenerateRequest, native_names
from minisgl.server.prepared import Converted, Echo, Kind, Prepared, Wanted
from minisgl.server.prompts import Template, begins_in_thought, render, thought_before
from minisgl.server.protocol import ChatRequest, CompletionRequest
from minisgl.server.reading import Reading
from minisgl.server.sampling import Sampling
from minisgl.server.structured import field_of, grammar_from_request
from minisgl.server.tokens import detokenize, tokenize
from minisgl.text.tokenizer import Tokenizer


class Preparation:
    """One served model, further `names` for it, and the `max_live` requests that one body may hold at most.

    Safe to use from several threads.
    """

    def __init__(self, model: ModelInfo, tokenizer: Tokenizer, max_live: int, names: Sequence[str] = ()) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_live = max_live
        self.names = tuple(names)

    @functools.cached_property
    def template(self) -> Template:
        """What the model's chat template knows."""
        return Template.of(self.tokenizer)

    def prepare(self, kind: Kind, body: bytes) -> Prepared | Converted:
        """What a body asks for; raises InvalidRequestError."""
        match kind:
            case "chat":
                return self.chat(body)
            case "completion":
                return self.completion(body)
            case "generate":
                return self.generate(body)
            case "tokenize":
                return Converted(msgspec.json.encode(tokenize(self, body)))
            case "detokenize":
                return Converted(msgspec.json.encode(detokenize(self, body)))
        assert_never(kind)

    def chat(self, body: bytes) -> Prepared:
        """A request to /v1/chat/completions; raises InvalidRequestError."""
        chat = ChatRequest.parse(body)
        chat.check()
        self.check_model(chat.model)
        grammar = grammar_from_request(chat.structured)
        if chat.must_call:
            grammar = forced_grammar(chat)
        elif grammar is not None and chat.offered_tools:
            calls = optional_calls(chat, self.template.check_tools())
            grammar = msgspec.structs.replace(grammar, calls=calls)
        prompt = render(self.tokenizer, self.template, chat, chat.offered_tools)
        reading = self.reading(chat, prompt)
        if grammar is not None and reading.thinks:
            grammar = msgspec.structs.replace(grammar, thought=thought_before(prompt, chat))
        params = chat.params(grammar)
        try:
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            with chat.named_limit():
                requests = self.requests("chatcmpl", [ids], params, chat.num_choices, chat.priority)
        except InvalidRequestError as error:
            if error.param in (None, "prompt"):
                error.param = "messages"
            raise
        return Prepared(
            requests=requests,
            wanted=wanted(chat, copies=chat.num_choices, logprobs=bool(chat.logprobs)),
            reading=reading,
            grammar_field="tools" if chat.must_call else field_of(chat.structured),
        )

    def reading(self, chat: ChatRequest, prompt: str) -> Reading:
        """How the answers to a chat are read."""
        thinks = self.template.thinks and chat.separate_reasoning is not False
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

    def completion(self, body: bytes) -> Prepared:
        """A request to /v1/completions, with the prompts to be echoed; raises InvalidRequestError."""
        completion = CompletionRequest.parse(body)
        completion.check()
        self.check_model(completion.model)
        params = completion.params(grammar_from_request(completion.structured))
        prompts = completion.prompts()
        try:
            ids = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
            requests = self.requests("cmpl", ids, params, completion.drawn, completion.priority)
        except InvalidRequestError as error:
            error.param = error.param or "prompt"
            raise
        return Prepared(
            requests=requests,
            wanted=wanted(
                completion,
                copies=completion.drawn,
                logprobs=completion.logprobs is not None,
                hidden=completion.scores_only,
            ),
            echoes=self.echoes(prompts, ids, params) if completion.echo else [],
            grammar_field=field_of(completion.structured),
        )

    def echoes(
        self, prompts: Sequence[str | list[int]], ids: Sequence[list[int]], params: SamplingParams
    ) -> list[Echo]:
        """The prompts as texts; where their tokens begin is only needed where they are scored."""
        scored = params.prompt_logprobs is not None
        texts = [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, params.skip_special_tokens)
            for prompt in prompts
        ]
        return [
            Echo(text, self.tokenizer.starts(tokens, text) if scored else [])
            for text, tokens in zip(texts, ids, strict=True)
        ]

    def generate(self, body: bytes) -> Prepared:
        """A request to /generate; raises InvalidRequestError."""
        asked = GenerateRequest.parse(body)
        asked.check()
        try:
            grammar = grammar_from_request(asked.sampling.structured)
        except InvalidRequestError as error:
            error.param = "sampling_params"
            raise
        params = asked.params(grammar)
        field = "text" if asked.text is not None else "input_ids"
        try:
            ids = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in asked.prompts()]
            requests = self.requests("gen", ids, params, asked.num_choices, asked.priority)
        except InvalidRequestError as error:
            if error.param in (None, "prompt"):
                error.param = field
            raise native_names(error) from error
        return Prepared(
            requests=requests,
            wanted=Wanted(
                stream=bool(asked.stream),
                num_choices=asked.num_choices,
                copies=asked.num_choices,
                logprobs=bool(asked.return_logprob),
                is_batch=asked.is_batch,
                top_logprobs=bool(asked.top_logprobs_num),
                prompt_logprobs_from=asked.prompt_logprobs_from,
                logprob_texts=bool(asked.return_text_in_logprobs),
            ),
            grammar_field=None if grammar is None else "sampling_params",
        )

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for any other model than the one served; none named means that one."""
        if name is not None and name != self.model.name and name not in self.names:
            raise ModelNotFoundError(f"the model {name!r} is not served here; {self.model.name!r} is", param="model")

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


def wanted(body: Sampling, *, copies: int, logprobs: bool, hidden: bool = False) -> Wanted:
    """How the answer to a body of OpenAI's endpoints is to look."""
    return Wanted(
        stream=bool(body.stream),
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        num_choices=body.num_choices,
        copies=copies,
        hidden=hidden,
        logprobs=logprobs,
        token_ids=bool(body.return_tokens_as_token_ids),
    )


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
