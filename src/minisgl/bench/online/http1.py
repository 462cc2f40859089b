"""One HTTP/1.1 request on a connection of its own (RFC 9112), with little work for each part of the answer.

General clients spend several times as long on each piece of a stream, which a benchmark of thousands of streams
would measure instead of the server.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

from minisgl.errors import ConfigError

HEAD_LIMIT: Final = 64 * 1024
BUFFER_LIMIT: Final = 64 * 1024 * 1024


class WireError(Exception):
    """The answer is not HTTP/1.1, or it ended before its end."""


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
        """A whole request."""
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


class Exchange(asyncio.Protocol):
    """The answer to one request. `done` is set when it has come whole, or raises WireError."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: dict[str, str] = {}
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._left: int | None = None  # bytes of a body whose length is known
        self._chunked = False

    def on_head(self) -> None:
        """The status and the headers are there."""

    def on_body(self, data: bytes, now: float) -> None:
        """A part of the body, and when it came on the performance counter."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def send(self, request: bytes) -> float:
        """Write the request; when, on the performance counter."""
        assert self._transport is not None
        now = time.perf_counter()
        self._transport.write(request)
        return now

    def close(self) -> None:
        """Leave, whatever is still to come."""
        if self._transport is not None:
            self._transport.abort()
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # nobody may have waited for it

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        now = time.perf_counter()
        if self.done.done():
            return
        if self._rest:
            data = self._rest + data
        try:
            if not self.status:
                body = self._read_head(data)
                if body is None:
                    self._rest = data
                    return
                data = body
            self._rest = self._read_body(data, now)
        except (WireError, ValueError) as error:
            self._end(WireError(f"not an answer in HTTP/1.1: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        """The end of a body without a length; of any other it is too early."""
        until_close = self.status and not self._chunked and self._left is None and error is None
        self._end(None if until_close else WireError("the connection was closed before the answer's end"))

    def _end(self, error: WireError | None = None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)
        if self._transport is not None:
            self._transport.close()

    def _read_head(self, data: bytes) -> bytes | None:
        """Read the status line and the headers; the bytes behind them, None while they are not whole."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > HEAD_LIMIT:
                raise WireError("the head does not end")
            return None
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise WireError(first[:80])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
        self.status = int(rest[:3])
        if 100 <= self.status < 200:
            self.status = 0
            return self._read_head(data[end + 4 :]) if len(data) > end + 4 else b""
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in self.headers:
            self._left = int(self.headers["content-length"])
        self.on_head()
        return data[end + 4 :]

    def _read_body(self, data: bytes, now: float) -> bytes:
        """Hand on what is whole of the body; the bytes to look at again when more have come."""
        if self._chunked:
            return self._read_chunks(data, now)
        if not self.status:
            return data
        if data:
            self.on_body(data, now)
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self._end()
        return b""

    def _read_chunks(self, data: bytes, now: float) -> bytes:
        parts: list[bytes] = []
        at, last = 0, False
        while (end := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:end].partition(b";")[0], 16)
            stop = end + 2 + size
            if size == 0:
                last = True
                break
            if size < 0 or size > BUFFER_LIMIT:
                raise WireError(f"a chunk of {size} bytes")
            if len(data) < stop + 2:
                break
            parts.append(data[end + 2 : stop])
            at = stop + 2
        if parts:
            self.on_body(parts[0] if len(parts) == 1 else b"".join(parts), now)
        if last:
            self._end()
        return data[at:]


async def connect(target: Target, exchange: Exchange) -> None:
    """Open a connection. Raises OSError (ssl.SSLError is one)."""
    name = target.host if target.tls is not None else None
    await asyncio.get_running_loop().create_connection(
        lambda: exchange, target.address, target.port, family=target.family, ssl=target.tls, server_hostname=name
    )


class Whole(Exchange):
    """An answer of which only the whole is of interest."""

    def __init__(self) -> None:
        super().__init__()
        self.body = bytearray()

    def on_body(self, data: bytes, now: float) -> None:
        """Collect."""
        self.body += data


async def fetch(target: Target, method: str, path: str, body: bytes = b"", timeout: float = 30.0) -> tuple[int, bytes]:
    """Status and body of an answer. Raises OSError (TimeoutError is one) or WireError."""
    exchange = Whole()
    try:
        async with asyncio.timeout(timeout):
            await connect(target, exchange)
            exchange.send(target.request(method, path, body))
            await exchange.done
    finally:
        exchange.close()
    return exchange.status, bytes(exchange.body)
