"""From the engine's tokens to completions: text, the chunks of a stream, and whole ones folded from their chunks."""

import abc
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from minisgl.core.types import MAX_LOGPROBS, FinishReason, Request, TokenEvent, TokenLogprobs
from minisgl.errors import InvalidRequestError
from minisgl.server import responses
from minisgl.server.engine_client import EngineClient, RequestGroup
from minisgl.server.generate import GenerateRequest
from minisgl.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from minisgl.server.responses import ChatDelta, ChatLogprobs, ChunkChoice, TextChoice, TextLogprobs, Usage, sse
from minisgl.server.tools import OutputParser, ParserConfig
from minisgl.text.tokenizer import RequestOutput, TextStream, Tokenizer

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have; OpenAI's value
EventChunks = AsyncGenerator[bytes, None]  # server-sent events, several together where they came together
Echo = tuple[str, list[int]]  # a prompt as text, and where in it the text of each of its tokens begins
# Fields of a body that may be large and that no answer needs.
BULK = ("messages", "prompt", "tools", "metadata", "user", "safety_identifier", "prompt_cache_key")


class ScoredToken(NamedTuple):
    token: int
    logprobs: TokenLogprobs | None  # None at the beginning of a prompt
    start: int  # where its text begins in that of its choice


class LogprobWriter:
    """Writes log-probabilities with the tokens of a vocabulary; `as_ids` writes `token_id:5` for them."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False, most: int = MAX_LOGPROBS) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._as_ids = as_ids
        self._most = most  # of the most probable tokens, of those that were computed

    def text(self, token: int) -> str:
        """A token as text. A part of a character is `bytes:` and its bytes, escaped."""
        if self._as_ids:
            return f"token_id:{token}"
        value = self._token_bytes(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def chat(self, scored: Iterable[ScoredToken]) -> ChatLogprobs:
        content = []
        for token, found, _ in scored:
            if found is not None:
                top = zip(found.top_ids, found.top_logprobs, strict=True)
                tops = [responses.TopLogprob(*self._entry(*entry)) for entry in top]
                content.append(responses.ChatTokenLogprob(*self._entry(token, found.logprob), tops))
        return ChatLogprobs(content)

    def _entry(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        return self.text(token), finite(logprob), list(self._token_bytes(token))

    def prompt(self, choice: "ChoiceState") -> responses.PromptLogprobs:
        """vLLM's `prompt_logprobs`."""
        written: responses.PromptLogprobs = []
        for token, found in zip(choice.request.prompt, choice.prompt_logprobs, strict=False):
            entries: dict[str, responses.PromptLogprob] = {}
            for other, logprob, rank in self._likeliest(token, found):
                entries.setdefault(str(other), responses.PromptLogprob(logprob, rank, self.text(other)))
            written.append(entries or None)
        return written

    def completion(self, scored: Iterable[ScoredToken]) -> TextLogprobs:
        written = TextLogprobs([], [], [], [])
        for token, found, start in scored:
            top: dict[str, float] = {}
            for other, logprob, _ in self._likeliest(token, found):
                top.setdefault(self.text(other), logprob)
            written.tokens.append(self.text(token))
            written.token_logprobs.append(None if found is None else finite(found.logprob))
            written.top_logprobs.append(top or None)
            written.text_offset.append(start)
        return written

    def _likeliest(self, token: int, found: TokenLogprobs | None) -> list[tuple[int, float, int | None]]:
        """The most probable tokens with their ranks, and the token itself, which may be one of them."""
        if found is None:
            return []
        top = zip(found.top_ids[: self._most], map(finite, found.top_logprobs), itertools.count(1), strict=False)
        return [*top, (token, finite(found.logprob), None)]


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def mean_logprob(logprobs: Sequence[TokenLogprobs]) -> float:
    return fmean(found.logprob for found in logprobs) if logprobs else LEAST_LOGPROB


@dataclasses.dataclass(slots=True)
class ChoiceState(RequestOutput):
    stream: TextStream
    index: int = 0
    hidden: bool = False  # the request is there for its prompt: what it generates is not shown
    begun: bool = False  # it has a chunk
    num_given: int = 0  # tokens that were in chunks
    parser: OutputParser | None = None  # None where the text is plain

    def take(self, event: TokenEvent) -> str:
        """Raises InvalidRequestError when the engine refuses."""
        if event.finish is FinishReason.ERROR:
            raise InvalidRequestError(event.error or "the engine refused the request")
        if self.hidden:
            end = None if event.finish is None else FinishReason.LENGTH
            event = msgspec.structs.replace(event, tokens=(), logprobs=(), finish=end)
        return RequestOutput.take(self, event)  # a dataclass with slots has no super()

    def scored(self, first: int = 0) -> list[ScoredToken]:
        """The tokens from the `first` on, where log-probabilities are wanted."""
        starts = [*self.stream.starts[first:], self.stream.num_characters]  # a stop token that is not shown has none
        return list(map(ScoredToken, self.token_ids[first:], self.logprobs[first:], starts))

    def ended(self) -> dict[str, Any]:
        return {"stop_reason": self.stop_reason, "matched_stop": self.matched}


@dataclasses.dataclass
class Generation(abc.ABC):
    """What answers one HTTP request: a choice for each of its requests, whose events it takes in."""

    tokenizer: Tokenizer
    model: str  # its name
    body: ChatRequest | CompletionRequest | GenerateRequest
    requests: list[Request]
    checks: Sequence[Callable[[], None]]  # of grammars, where they are still to be done
    parser: ParserConfig | None = None  # None where it is plain text
    echoes: Sequence[Echo] = ()  # each prompt that is to be shown

    def __post_init__(self) -> None:
        config, streams = self.parser, bool(self.body.stream)
        special = () if config is None else config.special_tokens
        hidden = not isinstance(self.body, ChatRequest) and self.body.scores_only
        for name in BULK:
            if hasattr(self.body, name):
                setattr(self.body, name, None)
        self.choices: list[ChoiceState] = []
        for request in self.requests:
            stream = self.tokenizer.stream(request.params, special, request.prompt)
            parser = None if config is None else OutputParser(config, streams)
            self.choices.append(ChoiceState(request, stream, index=len(self.choices), hidden=hidden, parser=parser))
        self.by_id = {choice.request.id: choice for choice in self.choices}

    @abc.abstractmethod
    def result(self) -> Any:
        """The whole completion, when all has come."""

    @abc.abstractmethod
    def chunks(self, client: EngineClient) -> EventChunks:
        """A stream's events; the requests are in the engine until this is closed."""

    async def whole(self, client: EngineClient) -> Any:
        with client.submit(self.requests) as group:
            async for batch in group.batches():
                self.take(batch.events, group)
        return self.result()

    def take(self, events: Iterable[TokenEvent], group: RequestGroup) -> list[tuple[ChoiceState, str]]:
        """The text that these add, by choice; those that have come to a stop string are ended in the engine."""
        texts: dict[str, str] = {}
        for event in events:
            if not event.tokens and event.finish is None:  # an admission
                continue
            choice = self.by_id[event.id]
            texts[event.id] = texts.get(event.id, "") + choice.take(event)
            if choice.stream.matched is not None and event.finish is None:
                group.abort(event.id)
        return [(self.by_id[request_id], text) for request_id, text in texts.items()]

    def usage(self, generated: int | None = None) -> Usage:
        """Tokens so far, or so many generated ones; a prompt with several choices counts once."""
        firsts = self.choices[:: self.body.num_generated]
        prompt = sum(len(choice.request.prompt) for choice in firsts)
        completion = sum(len(choice.token_ids) for choice in self.choices) if generated is None else generated
        cached = sum(choice.cached_tokens for choice in firsts)
        return Usage(prompt, completion, prompt + completion, responses.PromptTokensDetails(cached))


class OpenAICompletion(Generation):
    """A completion in OpenAI's form; the whole one is folded from its own chunks."""

    body: ChatRequest | CompletionRequest

    def __post_init__(self) -> None:
        super().__post_init__()
        first, body = self.requests[0], self.body
        options = body.stream_options or StreamOptions()
        self.include_usage = bool(options.include_usage)
        self.continuous = self.include_usage and bool(options.continuous_usage_stats)
        name, now, usage = first.id.rpartition("-")[0], int(time.time()), None if self.include_usage else UNSET
        kind: responses.ResultKind = "text_completion"
        if isinstance(body, ChatRequest):
            kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self.frame: responses.Result[Any] = responses.Result(
            id=name, object=kind, created=now, model=self.model, choices=[], usage=usage
        )
        # `best_of` has the engine compute some that are not shown.
        most = body.logprobs if isinstance(body, CompletionRequest) else first.params.logprobs
        as_ids = bool(body.return_tokens_as_token_ids)
        self.writer = None if most is None else LogprobWriter(self.tokenizer, as_ids, most)

    @abc.abstractmethod
    def chunk_choices(self, choice: ChoiceState, text: str) -> Sequence[Any]:
        """The chunks that a choice's new text becomes; with its `finish` it is the last."""

    @abc.abstractmethod
    def whole_choice(self, index: int, choice: ChoiceState, chunks: Sequence[Any]) -> Any:
        """A choice folded from the chunks of all its text."""

    def result(self) -> responses.Result[Any]:
        choices = [
            self.whole_choice(index, choice, self.chunk_choices(choice, choice.stream.text))
            for index, choice in enumerate(self.shown())
        ]
        return msgspec.structs.replace(self.frame, choices=choices, usage=self.usage())

    def shown(self) -> list[ChoiceState]:
        """Of more choices of a prompt than are wanted (`best_of`), those with the best mean log-probability."""
        choices, generated, wanted = self.choices, self.body.num_generated, self.body.n or 1
        if generated == wanted:
            return choices
        prompts = [choices[first : first + generated] for first in range(0, len(choices), generated)]
        return [c for several in prompts for c in sorted(several, key=lambda c: -mean_logprob(c.logprobs))[:wanted]]

    def opening(self, choice: ChoiceState) -> list[bytes]:
        """The events that come before the choice's own."""
        return []

    def new_tokens(self, choice: ChoiceState) -> tuple[list[int] | UnsetType, list[ScoredToken]]:
        """The tokens that were in no chunk yet: their ids, where they are wanted, and their scores."""
        first, choice.num_given = choice.num_given, len(choice.token_ids)
        return choice.token_ids[first:] if self.body.return_token_ids else UNSET, choice.scored(first)

    def prompt_ids(self, choice: ChoiceState) -> list[int] | UnsetType:
        return choice.request.prompt.tolist() if self.body.return_token_ids else UNSET

    def scores(self, choice: ChoiceState) -> responses.PromptLogprobs | UnsetType:
        most = self.body.prompt_logprobs
        return UNSET if most is None else LogprobWriter(self.tokenizer, most=most).prompt(choice)

    async def chunks(self, client: EngineClient) -> EventChunks:
        # All chunks are alike but for the choice and the usage: both are written between what is encoded once.
        head, _, tail = (b"data: %b\n\n" % msgspec.json.encode(self.frame)).rpartition(b"]")
        with client.submit(self.requests) as group:
            async for batch in group.batches():
                pieces = self.take(batch.events, group)
                if self.continuous:
                    tail = b',"usage":' + msgspec.json.encode(self.usage()) + b"}\n\n"
                events: list[bytes] = []
                for choice, text in pieces:
                    events += self.opening(choice)
                    for chunk in self.chunk_choices(choice, text):
                        events.append(head + msgspec.json.encode(chunk) + b"]" + tail)
                if events:
                    yield b"".join(events)
        if self.include_usage:
            yield sse(msgspec.structs.replace(self.frame, usage=self.usage()))


class ChatCompletion(OpenAICompletion):
    """The first chunk of a choice has the role, the last one only its finish reason."""

    def opening(self, choice: ChoiceState) -> list[bytes]:
        """The chunk of the role, which counts no token; the first of all has the prompt's ids where they are wanted."""
        if choice.begun:
            return []
        ids = UNSET if any(other.begun for other in self.choices) else self.prompt_ids(choice)
        choice.begun = True
        chunk = ChunkChoice(choice.index, ChatDelta(role="assistant", content=""))
        usage = self.usage(0) if self.continuous else self.frame.usage
        return [sse(msgspec.structs.replace(self.frame, choices=[chunk], usage=usage, prompt_token_ids=ids))]

    def chunk_choices(self, choice: ChoiceState, text: str) -> list[ChunkChoice]:
        index, parser, finish = choice.index, choice.parser, choice.finish
        if parser is not None:
            chunks = [ChunkChoice(index, delta) for delta in parser.push(text, finish)]
        else:
            chunks = [ChunkChoice(index, ChatDelta(content=text))] if text else []
        if finish is not None:
            called = parser is not None and parser.num_calls > 0
            chunks.append(ChunkChoice(index, ChatDelta(), finish_word(finish, called), **choice.ended()))
        if chunks and (self.body.return_token_ids or self.writer is not None):
            ids, scored = self.new_tokens(choice)  # also those of text that was held back
            logprobs = self.writer.chat(scored) if self.writer is not None and scored else None
            chunks[0] = msgspec.structs.replace(chunks[0], token_ids=ids, logprobs=logprobs)
        return chunks

    def whole_choice(self, index: int, choice: ChoiceState, chunks: Sequence[ChunkChoice]) -> responses.ChatChoice:
        deltas = [chunk.delta for chunk in chunks]
        content = "".join(delta.content or "" for delta in deltas)
        reasoning = "".join(delta.reasoning_content or "" for delta in deltas)
        calls = [msgspec.structs.replace(call, index=UNSET) for delta in deltas for call in delta.tool_calls or ()]
        said = content or (None if calls else "")
        message = responses.AssistantMessage(said, reasoning_content=reasoning or UNSET, tool_calls=calls or UNSET)
        finish, logprobs, ids = chunks[-1].finish_reason, chunks[0].logprobs, chunks[0].token_ids
        return responses.ChatChoice(index, message, finish, logprobs, token_ids=ids, **choice.ended())

    def result(self) -> responses.Result[Any]:
        ids, scores = self.prompt_ids(self.choices[0]), self.scores(self.choices[0])
        return msgspec.structs.replace(super().result(), prompt_token_ids=ids, prompt_logprobs=scores)


class TextCompletion(OpenAICompletion):
    """The last chunk of a choice has its finish reason, the first one the prompt where that is echoed."""

    def chunk_choices(self, choice: ChoiceState, text: str) -> list[TextChoice]:
        """Tokens without text yet go with the next chunk that has some."""
        index, finish, echoes, first = choice.index, choice.finish, self.echoes, not choice.begun
        echo, starts = echoes[index // self.body.num_generated] if echoes else ("", [])
        text = echo + text if first else text
        if not text and finish is None:
            return []
        choice.begun = True
        ids, scored = self.new_tokens(choice)
        logprobs = None
        if self.writer is not None:
            prompt = map(ScoredToken, choice.request.prompt, choice.prompt_logprobs, starts) if first else ()
            shifted = [ScoredToken(token, found, len(echo) + start) for token, found, start in scored]
            logprobs = self.writer.completion([*prompt, *shifted])
        ended = {} if finish is None else choice.ended()
        more = {"prompt_token_ids": self.prompt_ids(choice) if first else UNSET, "token_ids": ids, **ended}
        return [TextChoice(index, text, finish_word(finish, False), logprobs, **more)]

    def whole_choice(self, index: int, choice: ChoiceState, chunks: Sequence[TextChoice]) -> TextChoice:
        return msgspec.structs.replace(chunks[0], index=index, prompt_logprobs=self.scores(choice))


class SglangCompletion(Generation):
    """A completion of /generate; each event of a stream has all the text so far."""

    body: GenerateRequest

    def __post_init__(self) -> None:
        super().__post_init__()
        self.is_batch = self.body.is_batch or self.body.num_generated > 1
        self._writer = LogprobWriter(self.tokenizer)
        self._started = time.monotonic()

    def result(self) -> responses.SglangResult | list[responses.SglangResult]:
        results = [self._result(choice) for choice in self.choices]
        return results if self.is_batch else results[0]

    async def chunks(self, client: EngineClient) -> EventChunks:
        with client.submit(self.requests) as group:
            async for batch in group.batches():
                if pieces := self.take(batch.events, group):
                    yield b"".join([sse(self._result(choice)) for choice, _ in pieces])

    def _result(self, choice: ChoiceState) -> responses.SglangResult:
        lists: dict[str, Any] = {}
        number = choice.index // self.body.num_generated  # of the prompt
        if (top := choice.request.params.logprobs) is not None:
            start = self.body.of_prompt("logprob_start_len", number)
            entries = zip(choice.request.prompt, choice.prompt_logprobs, strict=False)
            scored = [ScoredToken(*entry, 0) for entry in entries][start:]
            lists = self._logprobs("output", choice.scored(), top) | self._logprobs("input", scored, top)
        index = choice.index if self.is_batch else UNSET
        text, ids, prompt = choice.stream.text, choice.token_ids, len(choice.request.prompt)
        name = self.body.of_prompt("rid", number) or choice.request.id
        finish: dict[str, Any] | None = {"type": "stop", "matched": choice.matched}
        if choice.finish is not FinishReason.STOP:
            finish = None if choice.finish is None else {"type": "length", "length": len(choice.token_ids)}
        latency = round(time.monotonic() - self._started, 6)
        meta = responses.SglangMeta(name, finish, prompt, len(ids), choice.cached_tokens, latency, **lists)
        return responses.SglangResult(text=text, output_ids=ids, meta_info=meta, index=index)

    def _logprobs(self, side: str, scored: Sequence[ScoredToken], top: int) -> dict[str, Any]:
        own = [self._entry(token, None if found is None else found.logprob) for token, found, _ in scored]
        if not top:
            return {f"{side}_token_logprobs": own}
        tops = [None if f is None else list(map(self._entry, f.top_ids, f.top_logprobs)) for _, f, _ in scored]
        return {f"{side}_token_logprobs": own, f"{side}_top_logprobs": tops}

    def _entry(self, token: int, logprob: float | None) -> responses.TokenEntry:
        text = self._writer.text(token) if self.body.return_text_in_logprobs else None
        return None if logprob is None else finite(logprob), token, text


def finish_word(finish: FinishReason | None, called: bool) -> responses.FinishWord | None:
    if finish is FinishReason.STOP:
        return "tool_calls" if called else "stop"
    return None if finish is None else "length"
