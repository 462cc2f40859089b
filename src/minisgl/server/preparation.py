"""From a request's body to its completion: read, validate, render, tokenise, check. It may take seconds."""

import asyncio
import contextlib
import dataclasses
import logging
import random
import re
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from minisgl.config import Config
from minisgl.core.types import REASONING_END, REASONING_START, Grammar, ModelInfo, Request, SamplingParams
from minisgl.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, UnsupportedParameterError
from minisgl.server import protocol
from minisgl.server.completion import ChatCompletion, Echo, Generation, SglangCompletion, TextCompletion
from minisgl.server.engine_client import EngineClient
from minisgl.server.errors import BodyTooLargeError, ForbiddenError, MediaTypeError, OverloadedError, SlowBodyError
from minisgl.server.generate import GenerateRequest, SglangSampling
from minisgl.server.protocol import ChatRequest, CompletionRequest, TokenizeConversation, require
from minisgl.server.responses import Detokenized, Tokens
from minisgl.server.tools import ParserConfig, Reasoning, ToolFormat, detect_tool_format, forced_call_grammar
from minisgl.text.tokenizer import Tokenizer

SMALL_BODY = 64 * 2**10  # bytes; such bodies have threads of their own
BRIEF_BODY, BRIEF_QUOTES, BRIEF_ARRAYS = 4096, 64, 4  # of a body that is prepared in some ms, most in less than one
BRIEF_REST = 10.0  # times as long as it took to prepare one the event loop prepares no other
SMALL_THREADS, LARGE_THREADS = 4, 1  # reading JSON holds the interpreter's lock: no two large bodies at a time
GRAMMAR_THREADS = 4  # each waits for a process
BODY_SECONDS, BODY_RATE = 30.0, 32 * 2**10  # a body may take so long, and a second for so many of its bytes
PART_SECONDS = 0.004  # from a part of a large body to the next of any: reading is the event loop's work
HELD_BYTES = 256 * 2**20  # of all bodies at a time, or four of the largest
MAX_NESTED, MAX_VALUES = 2**17, 2**19  # arrays, objects and keys in a body, and all its values (a long context: more)
MAX_TOKENIZED = 2**17  # tokens of a text that is only tokenised, where a context is shorter
MAX_REPEATED = 2**22  # token ids that go to the engine with each of a body's requests
PIECE = 2**16  # characters tokenised at once, where a text may be far too long
PIECE_SLACK = 64  # tokens that cutting a piece out may add to its own
JSON_TYPE = re.compile(r"[\w.-]+/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)

logger = logging.getLogger(__name__)

T = TypeVar("T")
Prompt = str | list[int]
Check = Callable[[], None]


@dataclasses.dataclass
class Preparation:
    """One served model. Every method raises InvalidRequestError, and is safe to use from several threads."""

    model: ModelInfo
    tokenizer: Tokenizer
    max_live: int  # requests that one body may hold
    names: Sequence[str] = ()  # that requests may call the model
    # Raises for a grammar that cannot be enforced, or returns what finds out, in seconds; None: none can be enforced.
    check_grammar: Callable[[Grammar], Check | None] | None = None

    def __post_init__(self) -> None:
        self.names = tuple(self.names) or (self.model.name,)
        template = self.tokenizer.tool_template
        self.tool_format = None if template is None else detect_tool_format(template.source, template.takes_tools)
        self.described_tools = False  # and said so in the log

    def chat(self, body: bytes) -> ChatCompletion:
        chat = ChatRequest.parse(body)
        self.check_model(chat.model)
        grammar, field = chat.requested_grammar()
        prompt = self.render(chat, chat.offered_tools)
        template = self.tokenizer.template_for(bool(chat.offered_tools))
        reasons = template is not None and REASONING_END in template.source and chat.separate_reasoning is not False
        reasoning = reasoning_before(prompt, chat) if reasons else None
        tool_format = self.require_tool_format() if chat.offered_tools else None
        if tool_format is not None and (chat.tool_choice == "required" or chat.named_tool is not None):
            grammar, field, tool_format = forced_call_grammar(chat), "tools", tool_format.forced()
        elif tool_format is not None and (grammar is not None or tool_format.generic):
            field = field or "tools"
            grammar = tool_format.with_optional_calls(grammar or tool_format.text_without_calls(), chat)
        if grammar is not None and reasoning is not None:
            grammar = msgspec.structs.replace(grammar, reasoning=reasoning)
        limit = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        with renamed("messages", {"max_tokens": limit}):
            params = self.tokenizer.with_bad_words(chat.params(grammar))
            ids = self.encode(prompt, False, cut=params.truncate_prompt_tokens is not None)
            requests = self.requests("chatcmpl", chat.num_generated, [ids], [params])
        checks = self.require_grammar(grammar, field)
        if tool_format is None and reasoning is None:
            return ChatCompletion(self.tokenizer, self.names[0], chat, requests, checks)
        names = frozenset(tool.function.name for tool in chat.offered_tools)
        most = 1 if chat.parallel_tool_calls is False else None
        parser = ParserConfig(tool_format, names, most, reasoning)
        return ChatCompletion(self.tokenizer, self.names[0], chat, requests, checks, parser)

    def completion(self, body: bytes) -> TextCompletion:
        asked = CompletionRequest.parse(body)
        prompts = parse_prompts(asked.prompt, "prompt")
        self.check_model(asked.model)
        grammar, field = asked.requested_grammar()
        with renamed("prompt"):
            params = self.tokenizer.with_bad_words(asked.params(grammar))
            requests = self.requests("cmpl", asked.num_generated, prompts, [params] * len(prompts))
        checks = self.require_grammar(grammar, field)
        firsts = requests[:: asked.num_generated]
        echoes = [self.echo(*entry) for entry in zip(prompts, firsts, strict=True)] if asked.echo else []
        return TextCompletion(self.tokenizer, self.names[0], asked, requests, checks, echoes=echoes)

    def generate(self, body: bytes) -> SglangCompletion:
        asked = GenerateRequest.parse(body)
        field = "text" if asked.text is not None else "input_ids"
        prompts = parse_prompts(asked.prompts, field)
        names = zip(SglangSampling.__struct_fields__, SglangSampling.__struct_encode_fields__, strict=True)
        with renamed(field, {name: f"sampling_params.{encoded}" for name, encoded in names}):
            grammars = [asked.sampling(index).requested_grammar()[0] for index in range(len(prompts))]
            params = [asked.params(index, grammar) for index, grammar in enumerate(grammars)]
            requests = self.requests("gen", asked.num_generated, prompts, params)
        kinds = dict.fromkeys(grammars)
        checks = [check for grammar in kinds for check in self.require_grammar(grammar, "sampling_params")]
        for index, request in enumerate(requests):
            if (rid := asked.of_prompt("rid", index // asked.num_generated)) is not None:  # it need not be unique
                requests[index] = msgspec.structs.replace(request, id=f"{rid}-{uuid.uuid4().hex}")
        return SglangCompletion(self.tokenizer, self.names[0], asked, requests, checks)

    def tokenize(self, body: bytes) -> Tokens:
        value = protocol.parse_object(body)
        asked: TokenizeConversation | protocol.TokenizeText
        if value.get("messages") is not None:
            asked = TokenizeConversation.parse(value)
            text, field, special = self.render(asked, asked.tools or ()), "messages", bool(asked.add_special_tokens)
        else:
            asked = protocol.TokenizeText.parse(value)
            text, field, special = asked.prompt, "prompt", asked.add_special_tokens is not False
        self.check_model(asked.model)
        with renamed(field):
            ids = self.encode(text, special, max(self.model.max_seq_len, MAX_TOKENIZED))
        names = [self.tokenizer.backend.id_to_token(token) for token in ids] if asked.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=self.model.max_seq_len, tokens=ids, token_strs=names)

    def detokenize(self, body: bytes) -> Detokenized:
        asked = protocol.DetokenizeRequest.parse(body)
        self.check_model(asked.model)
        last = self.model.vocab_size - 1
        known = all(0 <= token <= last for token in asked.tokens)
        require(known, f"token ids must be between 0 and {last}", "tokens")
        return Detokenized(self.tokenizer.decode(asked.tokens, bool(asked.skip_special_tokens)))

    def check_model(self, name: str | None) -> None:
        if name not in (None, *self.names):
            raise ModelNotFoundError(f"the model {name!r} is not served here; {self.names[0]!r} is", param="model")

    def echo(self, prompt: Prompt, request: Request) -> Echo:
        """A prompt as text, of ids with their special tokens; where its tokens begin is only needed to score them."""
        ids, params = request.prompt.tolist(), request.params
        whole = params.truncate_prompt_tokens is None
        text = prompt if whole and isinstance(prompt, str) else self.tokenizer.decode(ids, skip_special_tokens=False)
        return text, [] if params.prompt_logprobs is None else self.tokenizer.starts(ids, text)

    def requests(self, kind: str, copies: int, prompts: list[Prompt], params: list[SamplingParams]) -> list[Request]:
        """Checked requests, those of one prompt in a row; their ids are the completion's id and an index."""
        field = "n" if copies > 1 else "prompt"
        require(len(prompts) * copies <= self.max_live, f"at most {self.max_live} answers fit in one request", field)
        sizes = [len(own.allowed_token_ids or ()) + sum(map(len, own.bad_word_ids)) for own in params]
        rule = f"allowed_token_ids and bad_words of all answers may hold {MAX_REPEATED} tokens together"
        require(sum(sizes) * copies <= MAX_REPEATED, rule, "allowed_token_ids")
        requests: list[Request] = []
        base = f"{kind}-{uuid.uuid4().hex}"
        for prompt, own in zip(prompts, params, strict=True):
            cut = own.truncate_prompt_tokens is not None
            ids = self.encode(prompt, cut=cut) if isinstance(prompt, str) else prompt
            ids = self.model.truncate(ids, own)
            self.model.check(ids, own)
            request = Request.make(id="", prompt=ids, params=own)
            for copy in range(copies):
                seeded = msgspec.structs.replace(own, seed=nth_seed(own.seed, copy))
                requests.append(msgspec.structs.replace(request, id=f"{base}-{len(requests)}", params=seeded))
        return requests

    def encode(self, text: str, special: bool = True, most: int | None = None, cut: bool = False) -> list[int]:
        """With `cut` only the end is needed. Raises ContextLengthError for what is far beyond `most` ids, quickly."""
        limit = most or self.model.max_seq_len
        if cut:
            return self.tokenizer.encode(text[-limit * self.tokenizer.longest_token :], special)
        too_long = len(text) > limit * self.tokenizer.longest_token
        if len(text) > max(8 * limit, PIECE):  # hardly any that fits is
            count = start = 0
            while start < len(text) and not too_long:
                count += len(self.tokenizer.encode(text[start : start + PIECE], False)) - PIECE_SLACK
                start, too_long = start + PIECE, count >= limit
        if too_long:
            rule = f"this model's maximum context length is {self.model.max_seq_len} tokens"
            size = f"the {len(text)} characters of the prompt are more than {limit} tokens"
            raise ContextLengthError(f"{rule}, but {size}", param="prompt")
        return self.tokenizer.encode(text, special)

    def require_tool_format(self) -> ToolFormat:
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

    def require_grammar(self, grammar: Grammar | None, param: str | None) -> Sequence[Check]:
        """What raises for a grammar that cannot be enforced, unless that it can is known; errors name `param`."""
        if grammar is None:
            return ()
        if self.check_grammar is None:
            raise UnsupportedParameterError("structured output is not available on this server", param=param)
        with renamed(param):
            check = self.check_grammar(grammar)
        return () if check is None else (renamed(param)(check),)

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
        variables["add_generation_prompt"] = chat.add_generation_prompt is not False
        variables["continue_final_message"] = bool(chat.continue_final_message)
        with renamed("messages"):
            return self.tokenizer.render_chat(messages, **variables)


class Turns:
    """Threads for work that takes time. Clients have their turns one after the other, however much each wants. A thread
    rests `rest` times as long as its work took: what holds the interpreter's lock leaves it to others then.
    """

    def __init__(self, threads: int, rest: float = 0.0) -> None:
        self._rest = rest
        self._threads = ThreadPoolExecutor(threads, "prepare")
        self._free = asyncio.Semaphore(threads)
        self._next = WeakValueDictionary[str, asyncio.Lock]()  # by client: who has it waits for a thread, others for it

    async def run(self, client: str, work: Callable[[], T]) -> T:
        async with self._next.setdefault(client, asyncio.Lock()):
            await self._free.acquire()
        loop, started = asyncio.get_running_loop(), time.monotonic()
        job = loop.run_in_executor(self._threads, work)
        job.add_done_callback(lambda _: loop.call_later(self._rest * (time.monotonic() - started), self._free.release))
        return await asyncio.shield(job)  # a thread is free when its work ends, not when its client leaves


class Bodies:
    """The bodies that are being read or prepared, none above `max_size` bytes. `held` are their bytes by client: of one
    at most half of `most`, of all `most`; up to twice as much for small bodies and clients with less than a fair share.
    """

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.most = max(HELD_BYTES, 4 * max_size)
        self.held = Counter[str]()
        self.next_part = 0.0  # the earliest time for one of a large body, s

    @contextlib.asynccontextmanager
    async def read(self, request: HttpRequest, client: str) -> AsyncIterator[bytes]:
        """A body, held until the block ends. Raises BodyTooLargeError, OverloadedError or SlowBodyError."""
        start, size, kept = time.monotonic(), 0, 0
        parts: list[bytes] = []
        error: Exception | None = None
        try:
            # Some more than fits is read, so that the client gets to read the error.
            async for part in request.stream():
                size += len(part)
                error = error or self._refusal(client, size, len(part), time.monotonic() - start)
                if error is None:
                    parts.append(part)
                    kept += len(part)
                    self.held[client] += len(part)
                elif size > 4 * self.max_size or isinstance(error, SlowBodyError):
                    break
                if size > SMALL_BODY:
                    now = time.monotonic()
                    self.next_part = max(now, self.next_part + PART_SECONDS)
                    await asyncio.sleep(self.next_part - now)
            if error is not None:
                raise error
            body = b"".join(parts)
            parts.clear()
            yield body
        finally:
            self.held[client] -= kept
            if not self.held[client]:
                del self.held[client]

    def _refusal(self, client: str, size: int, more: int, seconds: float) -> Exception | None:
        if size > self.max_size:
            return BodyTooLargeError(f"the body must have at most {self.max_size} bytes")
        if seconds > BODY_SECONDS + size / BODY_RATE:
            return SlowBodyError(f"the body came too slowly: {size} bytes in {seconds:.0f} s")
        total, own = self.held.total() + more, self.held[client] + more
        fits = total <= self.most and own <= self.most // 2
        fair = size <= SMALL_BODY or own <= self.most // (len(self.held) + 1)
        if not fits and not (fair and total <= 2 * self.most):
            return OverloadedError("too many large bodies are being read; try again later")
        return None


def check_counts(body: bytes, most: int) -> None:
    """Raise InvalidRequestError for a body with more JSON values than a request may have, before they are built."""
    if within_counts(body, most):
        return
    without_escapes = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if without_escapes.count(b'"') <= 2 * most and within_counts(b"".join(without_escapes.split(b'"')[::2]), most):
        return  # the rest is text
    fields = protocol.parse_object(body, msgspec.Raw)
    largest = max(fields, key=lambda name: len(bytes(fields[name])))
    rule = f"a body may have {most}, and {MAX_NESTED} arrays, objects and keys"
    raise InvalidRequestError(f"{largest} holds too many values: {rule}", param=largest)


def within_counts(text: bytes, most: int) -> bool:
    return text.count(b"[") + text.count(b"{") + text.count(b":") <= MAX_NESTED and text.count(b",") <= most


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which this task does. When the client leaves it is cancelled: raises ClientDisconnect."""
    works = True
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        async with asyncio.timeout(None) as scope:
            watcher.add_done_callback(lambda _: scope.reschedule(0) if works else None)
            return await work
    except TimeoutError as error:
        if scope.expired():
            raise ClientDisconnect from error
        raise
    finally:
        works = False
        watcher.cancel()


@dataclasses.dataclass
class Api:
    client: EngineClient
    preparation: Preparation
    config: Config
    notes: Sequence[str]  # what the engine made of it
    folder: str  # of the model
    started: float  # s, on the monotonic clock
    health_timeout: float = 5.0  # s
    next_brief: float = 0.0  # the earliest time at which the event loop itself prepares a body
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))  # Unix time, s

    def __post_init__(self) -> None:
        model, longest = self.preparation.model, self.preparation.tokenizer.longest_token
        self.max_values = max(MAX_VALUES, 2 * model.max_seq_len)
        self.bodies = Bodies(self.config.max_body_size or min(2**22 + model.max_seq_len * longest, 2**24))
        self.small, self.large, self.grammars = Turns(SMALL_THREADS), Turns(LARGE_THREADS, 1.0), Turns(GRAMMAR_THREADS)

    async def prepare(self, prepare: Callable[[bytes], T], request: HttpRequest, renders: bool = True) -> T:
        """Read a body, and prepare it when its client, by its key or its address, has its turn. Where no request
        is live, a brief one needs no thread, unless it `renders` a chat: threads start slowly.
        """
        self.check_sender(request)
        client = self._client_of(request)
        async with self.bodies.read(request, client) as body:

            def work() -> T:
                check_counts(body, self.max_values)
                try:
                    return prepare(body)
                except RecursionError as error:
                    raise InvalidRequestError("the body is nested too deeply") from error

            started = time.monotonic()
            idle = not self.client.num_live and started >= self.next_brief
            brief = len(body) <= BRIEF_BODY and body.count(b'"') <= BRIEF_QUOTES and body.count(b"[") <= BRIEF_ARRAYS
            if idle and brief and not renders:
                try:
                    return work()
                finally:
                    self.next_brief = started + (1 + BRIEF_REST) * (time.monotonic() - started)
            with self.client.metrics.preparing.track_inprogress():
                if len(body) <= SMALL_BODY:
                    return await self.small.run(client, work)
                return await unless_disconnected(request.receive, self.large.run(client, work))

    def check_sender(self, request: HttpRequest, same_origin: bool = False) -> None:
        """In a server without keys: refuse what a web page of another origin can send without asking first (W3C,
        Fetch): a body that is not JSON, and with `same_origin` everything.
        """
        headers = request.headers
        if self.config.api_key:
            return
        has_body = "transfer-encoding" in headers or headers.get("content-length", "").strip("0")
        if has_body and not JSON_TYPE.match(headers.get("content-type", "")):
            raise MediaTypeError("the body must be JSON, sent with 'Content-Type: application/json'")
        if same_origin:
            own = f"{request.scope['scheme']}://{headers.get('host', '')}"
            # What is no browser sends neither header.
            foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            if foreign or headers.get("origin", own).lower() != own.lower():
                raise ForbiddenError("web pages of other origins may not do this", code="cross_origin")

    async def check(self, completion: Generation, request: HttpRequest) -> None:
        """Check grammars that are new here, in threads that no other preparation waits for."""
        for check in completion.checks:
            with self.client.metrics.preparing.track_inprogress():
                await unless_disconnected(request.receive, self.grammars.run(self._client_of(request), check))

    def _client_of(self, request: HttpRequest) -> str:
        address = "" if request.client is None else request.client.host
        return request.headers.get("authorization", "") if self.config.api_key else address


def parse_prompts(value: Any, param: str) -> list[Prompt]:
    """Every prompt, a text or token ids; raises InvalidRequestError unless there is at least one and none is empty."""
    single = isinstance(value, str) or (is_list_of(int, value) and bool(value))
    several = is_list_of(str, value) or (isinstance(value, list) and all(is_list_of(int, item) for item in value))
    kinds = "a string, a list of strings, token ids or a list of lists of token ids"
    require(single or several, f"{param} must be {kinds}", param)
    require(value and (single or all(value)), f"{param} must not be empty", param)
    return [value] if single else value


def is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {kind}


@contextlib.contextmanager
def renamed(field: str | None, names: Mapping[str, str] = {}) -> Iterator[None]:
    """Let errors name what the request does: `field` for the prompt, the grammar and those that name nothing."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param in (None, "prompt", "grammar"):
            error.param = field
        elif error.param in names:
            name = names[error.param]
            error.message = error.message.replace(error.param, name.rpartition(".")[2])
            error.param = name
        raise


def reasoning_before(prompt: str, chat: ChatRequest) -> Reasoning:
    """Whether a completion may begin with reasoning; the prompt or the message that it continues may have begun it."""
    if chat.continue_final_message:
        last = chat.messages[-1].text
        return "begun" if last.rfind(REASONING_START) > last.rfind(REASONING_END) else "none"
    if chat.add_generation_prompt is False or prompt.rstrip().endswith(REASONING_END):
        return "none"
    return "begun" if prompt.rstrip().endswith(REASONING_START) else "possible"


def nth_seed(seed: int | None, n: int) -> int:
    """The seed of the n-th choice of a prompt: the given one, then random ones that follow from it."""
    if seed is None:
        return secrets.randbits(63)
    return seed if n == 0 else random.Random(f"{seed} {n}").getrandbits(63)
