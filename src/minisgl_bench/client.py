"""A streamed completion over HTTP/1.1, with little work for each event: when its tokens came, and how many there were.

General clients spend several times as long on each piece of a stream, which a benchmark of thousands of streams
would measure instead of the server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from minisgl.errors import ConfigError


class AnswerError(Exception):
    """An answer that cannot be counted: a short kind that many answers may share, and what exactly is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class Target:
    """Where a server is: an address that needs no further look-up, and what the request's head says of it."""

    host: str
    address: str
    port: int
    family: int
    prefix: str
    tls: ssl.SSLContext | None
    key: str | None

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine by its address."""
        return self.address.startswith("127.") or self.address == "::1"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = [
            f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close",
            "Accept: text/event-stream, application/json", "User-Agent: minisgl-bench",
        ]  # fmt: skip
        if self.key is not None:
            head.append(f"Authorization: Bearer {self.key}")
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join((*head, "", "")).encode("latin-1") + body


def parse_target(url: str, key: str | None) -> Target:
    """The server at a URL, with or without its `/v1`. Raises ConfigError when there is no such host."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"--url {url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: not an address such as http://127.0.0.1:1919")
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key must be made of printable ASCII: it travels in a header")
    try:
        family, _, _, _, where = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--url {url}: {error.strerror}") from error
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, str(where[0]), port, family, prefix, tls, key)


class HttpExchange(asyncio.Protocol):
    """One request on a connection of its own. `done` is set when its answer has come whole, or raises AnswerError.

    `now` is when the bytes at hand came, on the performance counter. `on_…` are called by httptools.
    """

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.body = bytearray()
        self.now = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._has_length = False

    async def connect(self, target: Target) -> None:
        """Open a connection. Raises OSError (ssl.SSLError is one)."""
        name = target.host if target.tls is not None else None
        await asyncio.get_running_loop().create_connection(
            lambda: self, target.address, target.port, family=target.family, ssl=target.tls, server_hostname=name
        )

    def send(self, request: bytes) -> float:
        """Write the request; when, on the performance counter."""
        assert self._transport is not None
        now = time.perf_counter()
        self._transport.write(request)
        return now

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # nobody may have waited for it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            reason = str(error.__context__ or error) if self.status else data[:80].decode("latin-1").split("\r\n")[0]
            self._end(f"not an answer in HTTP/1.1: {reason}")

    def connection_lost(self, error: Exception | None) -> None:
        """The end of a body without a length; of any other it is too early."""
        whole = self.status and not self._has_length and error is None
        self._end(None if whole else "the connection was closed before the answer's end")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self.status = status if status >= 200 else 0

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        if self.status:
            self._end(None)

    def _end(self, failure: str | None) -> None:
        if not self.done.done() and failure is None:
            self.done.set_result(None)
        elif not self.done.done():
            kind = "cut off" if self.status in (0, 200) else f"HTTP {self.status}"
            self.done.set_exception(AnswerError(kind, str(failure)))
        if self._transport is not None:
            self._transport.close()


async def fetch(target: Target, method: str, path: str, body: bytes = b"", timeout: float = 30.0) -> tuple[int, bytes]:
    """Status and body of an answer. Raises OSError (TimeoutError is one) or AnswerError."""
    exchange = HttpExchange()
    try:
        async with asyncio.timeout(timeout):
            await exchange.connect(target)
            exchange.send(target.request(method, path, body))
            await exchange.done
    finally:
        exchange.close()
    return exchange.status, bytes(exchange.body)


@dataclass(slots=True)
class RequestRecord:
    """What became of one request. Times are in s on the performance counter, `times` one for each event with tokens.

    Counts are the server's own, from `usage`; None is what it did not say. `failure` is a short kind that many requests
    may share, `detail` what exactly happened to this one.
    """

    index: int
    due: float = 0.0
    sent: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    expected_input: int | None = None
    expected_output: int = 0
    expected_cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    text: str = ""
    failure: str | None = None
    detail: str = ""


class CompletionStream(HttpExchange):
    """The server-sent events of a completion (WHATWG HTML, section 9.2), most of them counted and not decoded.

    `events` has the last two, or all of them where the answer's text is wanted.
    """

    def __init__(self, record: RequestRecord, keep: bool) -> None:
        super().__init__()
        self.record = record
        self.finished = False
        self.error = b""
        self.events: list[bytes] = []
        self._keep = keep
        self._partial = b""

    def on_body(self, data: bytes) -> None:
        if self.status != 200:
            self.body += data
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
            lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
            if not lines:
                return
            event = lines[0]
        data = event[5:].strip()
        if data == b"[DONE]":
            self.finished = True
            return
        if b'"error"' in data and decode(data).get("error"):
            self.error = data
            return
        times = self.record.times
        if not times and not has_token(decode(data)):
            return
        times.append(self.now)
        if not self._keep and len(self.events) == 2:
            del self.events[0]
        self.events.append(data)

    def settle(self) -> None:
        """Read the counts when all has come. Raises AnswerError."""
        record = self.record
        if self.status != 200:
            raise AnswerError(f"HTTP {self.status}", error_text(bytes(self.body)))
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
    """A JSON object. Raises ValueError."""
    try:
        value: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise ValueError(f"an event is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("an event is not a JSON object")
    return value


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
    target: Target,
    path: str,
    body: bytes,
    record: RequestRecord,
    ready: Callable[[], Awaitable[None]],
    timeout: float,
    keep: bool,
) -> None:
    """Connect, wait for `ready()`, send, and fill the record; what goes wrong ends up in it.

    `timeout` is how long connecting may take, and then the answer, in s.
    """
    stream = CompletionStream(record, keep)
    request = target.request("POST", path, body)
    try:
        async with asyncio.timeout(timeout) as limit:
            await stream.connect(target)
            limit.reschedule(None)
            await ready()
            limit.reschedule(asyncio.get_running_loop().time() + timeout)
            record.sent = stream.send(request)
            await stream.done
        stream.settle()
    except AnswerError as error:
        record.failure, record.detail = error.kind, str(error)
    except TimeoutError:
        record.failure, record.detail = "timeout", f"nothing more within {timeout:g} s"
    except OSError as error:
        record.failure, record.detail = f"connect: {type(error).__name__}", str(error)
    except (KeyError, TypeError, ValueError) as error:
        record.failure, record.detail = "malformed answer", f"{type(error).__name__}: {error}"
    finally:
        stream.close()
