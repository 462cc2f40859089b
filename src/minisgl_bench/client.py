"""Streamed completions over HTTP/1.1 with little work for each event; a general client would be what is measured."""

import argparse
import asyncio
import itertools
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from minisgl.core.types import SamplingParams
from minisgl.errors import ConfigError
from minisgl_bench.metrics import RequestRecord
from minisgl_bench.traffic import IdPrompts, Session, TextPrompts, Turn

LEAD: Final = 0.2  # how long before its time a request gets its connection, in s
DEFAULTS: Final = msgspec.to_builtins(SamplingParams())
PATHS: Final = {"ids": "/v1/completions", "text": "/v1/completions", "chat": "/v1/chat/completions"}


class AnswerError(Exception):
    """An answer that cannot be counted; its arguments are a kind that many may share, and what exactly is wrong."""


@dataclass(frozen=True)
class Target:
    """Where a server is: its URL without `/v1`, and an address that needs no further look-up."""

    url: str
    host: str
    address: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None
    key: str | None

    def post(self, path: str, body: bytes) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = [
            f"POST {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close",
            "Accept: text/event-stream, application/json", "User-Agent: minisgl-bench",
            *([] if self.key is None else [f"Authorization: Bearer {self.key}"]),
            "Content-Type: application/json", f"Content-Length: {len(body)}",
        ]  # fmt: skip
        return "\r\n".join((*head, "", "")).encode("latin-1") + body

    def call(self, path: str, body: object = None, timeout: float = 30.0) -> Any:
        """The JSON of an answer to GET, or to POST of a body. Raises ConfigError with what the server says instead."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            said = error_text(error.read())
            raise ConfigError(f"the server refuses {request.get_method()} {path} with {error.code}: {said}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(f"no answer from {self.host}:{self.port}{self.prefix}{path}: {reason}") from error
        except ValueError as error:
            raise ConfigError(f"what {path} says is not JSON: {error}") from error


def parse_target(url: str, key: str | None) -> Target:
    url = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"--url {url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: not an address such as http://127.0.0.1:1919")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key must be made of printable ASCII: it travels in a header")
    try:
        *_, where = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--url {url}: {error.strerror}") from error
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    base = f"{parts.scheme}://{parts.netloc}{prefix}"
    return Target(base, parts.hostname, str(where[0]), port, prefix, tls, key)


class CompletionStream(asyncio.Protocol):
    """One request on a connection of its own, and the server-sent events of its answer (WHATWG HTML, section 9.2).

    Most events are counted and not decoded: `events` has the last two, or all of them where the answer's text is
    wanted (`keep`). `done` is set when the answer has come whole, or raises AnswerError. httptools calls `on_…`.
    """

    def __init__(self, record: RequestRecord, keep: bool) -> None:
        self.record = record
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.finished = False
        self.error = b""
        self.events: list[bytes] = []
        self._keep = keep
        self._status = 0
        self._body = bytearray()  # of an answer other than 200
        self._partial = b""  # an event that has not ended
        self._now = 0.0  # when the bytes at hand came
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._has_length = False

    async def connect(self, target: Target) -> None:
        name = target.host if target.tls is not None else None
        await asyncio.get_running_loop().create_connection(
            lambda: self, target.address, target.port, ssl=target.tls, server_hostname=name
        )

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self.record.sent = time.perf_counter()
        self._transport.write(request)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # no task may have waited for it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            reason = str(error.__context__ or error) if self._status else data[:80].decode("latin-1").split("\r\n")[0]
            self._end(f"not an answer in HTTP/1.1: {reason}")

    def connection_lost(self, error: Exception | None) -> None:
        """The end of a body without a length; of any other it is too early."""
        whole = self._status and not self._has_length and error is None
        self._end(None if whole else "the connection was closed before the answer's end")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._status = status if status >= 200 else 0

    def on_message_complete(self) -> None:
        if self._status:
            self._end(None)

    def _end(self, failure: str | None) -> None:
        if not self.done.done() and failure is None:
            self.done.set_result(None)
        elif not self.done.done():
            kind = "cut off" if self._status in (0, 200) else f"HTTP {self._status}"
            self.done.set_exception(AnswerError(kind, str(failure)))
        if self._transport is not None:
            self._transport.close()

    def on_body(self, data: bytes) -> None:
        if self._status != 200:
            self._body += data
            return
        data = self._partial + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self._partial = events.pop()
        for event in events:
            self._take(event)

    def _take(self, event: bytes) -> None:
        if not event.startswith(b"data:"):  # a comment, or fields before the data
            event = next((line for line in event.split(b"\n") if line.startswith(b"data:")), b"")
            if not event:
                return
        data = event[5:].strip()
        if data == b"[DONE]":
            self.finished = True
        elif b'"error"' in data and decode(data).get("error"):
            self.error = data
        elif self.record.times or has_token(decode(data)):
            self.record.times.append(self._now)
            if not self._keep and len(self.events) == 2:
                del self.events[0]
            self.events.append(data)

    def settle(self) -> None:
        record = self.record
        if self._status != 200:
            raise AnswerError(f"HTTP {self._status}", error_text(bytes(self._body)))
        if self.error:
            raise AnswerError("error in the stream", error_text(self.error))
        if not self.finished:
            raise AnswerError("cut off", "the stream ended without [DONE]")
        decoded = [decode(event) for event in self.events]
        usage = next((event["usage"] for event in reversed(decoded[-2:]) if event.get("usage")), None)
        # The last events may hold the usage, or the reason of the end, and no token.
        while decoded and len(record.times) > 1 and not has_token(decoded[-1]):
            decoded.pop()
            record.times.pop()
        if not isinstance(usage, dict):
            raise AnswerError("no usage", "the server did not count the tokens: stream_options.include_usage")
        record.prompt_tokens, record.completion_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and details.get("cached_tokens") is not None:
            record.cached_tokens = int(details["cached_tokens"])
        if not record.times or not record.completion_tokens:
            raise AnswerError("no tokens", f"{record.completion_tokens} tokens in {len(record.times)} events")
        if self._keep:
            choices = [(event.get("choices") or [{}])[0] for event in decoded]
            texts = (c.get("text") or (c.get("delta") or {}).get("content") or "" for c in choices)
            record.text = "".join(map(str, texts))


def decode(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"an event is not JSON, or no object: {error}") from error


def has_token(event: Mapping[str, Any]) -> bool:
    """Whether an event stands for a token: it has a choice, and in a chat its delta has more than the role."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if "delta" not in choice or any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def error_text(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


async def stream_completion(
    target: Target, path: str, body: bytes, record: RequestRecord, due: float | None, timeout: float, keep: bool
) -> None:
    """Connect, wait until due, send; fill the record, also with a failure. `timeout`: s to connect, and to answer."""
    stream = CompletionStream(record, keep)
    request = target.post(path, body)
    try:
        async with asyncio.timeout(timeout) as limit:
            await stream.connect(target)
            limit.reschedule(None)
            await sleep_until(due)
            record.due = time.perf_counter() if due is None else due
            limit.reschedule(asyncio.get_running_loop().time() + timeout)
            stream.send(request)
            await stream.done
        stream.settle()
    except AnswerError as error:
        record.failure, record.detail = error.args
    except TimeoutError:
        record.failure, record.detail = "timeout", f"nothing more within {timeout:g} s"
    except OSError as error:
        record.failure, record.detail = f"connect: {type(error).__name__}", str(error)
    except (KeyError, TypeError, ValueError) as error:
        record.failure, record.detail = "malformed answer", f"{type(error).__name__}: {error}"
    finally:
        stream.close()


async def sleep_until(due: float | None) -> None:
    if due is not None and (left := due - time.perf_counter()) > 0:
        await asyncio.sleep(left)


PlannedSession = tuple[Session, list[RequestRecord]]  # with a record for each turn


@dataclass(frozen=True)
class LoadClient:
    """How requests are made; `options` are those of `minisgl bench online`."""

    target: Target
    model: str
    prompts: IdPrompts | TextPrompts
    options: argparse.Namespace

    @property
    def keep_text(self) -> bool:
        return self.options.endpoint == "chat" and self.options.chats is not None

    def body(self, turn: Turn, seed: int, answers: Sequence[str]) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model, **self.prompts.fields(turn, seed, answers), **self.sampling(turn),
            "max_tokens": turn.output_length, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if not self.options.no_ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields, separators=(",", ":")).encode()

    def sampling(self, turn: Turn) -> dict[str, Any]:
        """The fields of a body that say how to sample: the recorded ones, where the turn has some."""
        if turn.sampling is None:
            return {"temperature": self.options.temperature}
        recorded = msgspec.to_builtins(turn.sampling)
        fields = {name: value for name, value in recorded.items() if value != DEFAULTS[name] and name != "ignore_eos"}
        if self.options.endpoint == "chat" and "logprobs" in fields:
            fields |= {"logprobs": True, "top_logprobs": turn.sampling.logprobs}
        if turn.priority:
            fields["priority"] = turn.priority
        return fields | {"temperature": turn.sampling.temperature}

    def prepare(self, sessions: Sequence[Session], seed: int, hits: Sequence[int] = ()) -> list[PlannedSession]:
        planned: list[PlannedSession] = [(session, []) for session in sessions]
        index = itertools.count()
        for session, records in planned:
            for turn in session.turns:
                record = RequestRecord(next(index), expected_output=turn.output_length)
                record.body = None if self.keep_text else self.body(turn, seed, ())
                record.expected_input = self.prompts.expected_tokens(turn)
                record.expected_cached = hits[record.index] if hits else 0
                records.append(record)
        return planned

    async def play(
        self, planned: PlannedSession, seed: int, start: float | None, done: Callable[[int], object]
    ) -> None:
        """Send a session's turns one after the other; the first at its time after `start`, or at once where None."""
        session, records = planned
        path, timeout = PATHS[self.options.endpoint], self.options.timeout
        answers: list[str] = []
        due = None if start is None else start + session.due
        for number, (turn, record) in enumerate(zip(session.turns, records, strict=True)):
            await sleep_until(None if due is None else due - LEAD)
            body, record.body = record.body or self.body(turn, seed, answers), None
            await stream_completion(self.target, path, body, record, due, timeout, self.keep_text)
            done(1)
            if record.failure is not None:
                for later in records[number + 1 :]:
                    later.failure, later.detail = "not sent", "an earlier turn failed"
                    done(1)
                return
            answers.append(record.text)
            due = time.perf_counter() + session.think if session.think else None

    async def open_loop(self, planned: Sequence[PlannedSession], seed: int, done: Callable[[int], object]) -> None:
        start = time.perf_counter() + LEAD
        async with asyncio.TaskGroup() as group:
            for item in planned:
                await sleep_until(start + item[0].due - LEAD)
                group.create_task(self.play(item, seed, start, done))

    async def closed_loop(
        self, planned: Sequence[PlannedSession], seed: int, concurrency: int, done: Callable[[int], object]
    ) -> None:
        queue = deque(planned)

        async def work() -> None:
            while queue:
                await self.play(queue.popleft(), seed, None, done)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(queue))):
                group.create_task(work())
