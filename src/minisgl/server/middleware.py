"""What every request passes before an endpoint: bounds on its connection, id and log line, CORS, API key, HEAD."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import h11
import msgspec
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from minisgl.config import Config
from minisgl.errors import InvalidRequestError
from minisgl.server.errors import UnauthorizedError, error_body, error_headers
from minisgl.server.metrics import ACCESS_RECORD, AccessRecord, Metrics
from minisgl.server.responses import json_response

OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # without a key: for load balancers; the page asks for one
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # asked every few seconds, logged at DEBUG
HEAD_LIMIT = 64 * 2**10  # bytes of the request line and the headers
READ_TIMEOUT = 30.0  # seconds between two pieces of a request

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("minisgl.access")


class AccessLog:
    """Gives each request an id, its own or the client's X-Request-Id, and a line in the log when it is answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
        host, port = scope.get("client") or ("-", 0)
        path = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
        record = AccessRecord(request_id, scope["method"], path[:256], f"{host}:{port}")
        header = (b"x-request-id", request_id.encode())

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        token = ACCESS_RECORD.set(record)
        try:
            await self.app(scope, receive, send_noting)
        finally:
            ACCESS_RECORD.reset(token)
            self.metrics.on_response(record, getattr(scope.get("route"), "path", "unmatched"))
            level = logging.DEBUG if record.path in QUIET_PATHS else logging.INFO
            access_logger.log(level, "%s", record.describe(time.monotonic()))


class KeyGuard:
    """Lets a request through when it has one of the keys as its bearer token (RFC 6750), else answers 401."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.digests = [digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN_PATHS or self.allows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = UnauthorizedError("this server asks for an API key: send it as 'Authorization: Bearer KEY'")
        await json_response(error_body(error), error.status, error_headers(error))(scope, receive, send)

    def allows(self, headers: Headers) -> bool:
        """Whether a key is right; the time says nothing about the keys, not even their lengths."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = digest(key.strip())
        right = [hmac.compare_digest(given, known) for known in self.digests]
        return any(right) and scheme.lower() == "bearer"


class HeadAsGet:
    """Answers HEAD as GET (RFC 9110, 9.3.2), which monitors send; uvicorn leaves the body away."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}  # uvicorn looks at its own
        try:
            await self.app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def with_middleware(app: ASGIApp, metrics: Metrics, config: Config) -> ASGIApp:
    """The application behind what the configuration asks of every request."""
    app = HeadAsGet(app)
    if config.api_key:
        app = KeyGuard(app, config.api_key)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    return AccessLog(app, metrics)


class BoundedConnection(h11.Connection):
    """h11's part of a connection, with a bound on every head; h11's own is on those that come in pieces."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEAD_LIMIT)
        self.too_large = False  # the last error was a head beyond the limit

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.too_large = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise
        if isinstance(event, h11.Request) and before - len(self.trailing_data[0]) > HEAD_LIMIT:
            self.too_large = True
            raise h11.RemoteProtocolError("too large a head", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with bounds on time. To a request, being cut off is what its client's leaving would be.

    `write_timeout` is how long (s) the transport's buffer may stay full. A client that reads slowly, but does, empties
    it in time; one that does not holds pages of the KV cache for nothing.
    """

    def __init__(self, *args: Any, write_timeout: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: BoundedConnection = BoundedConnection()
        self.write_timeout = write_timeout
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_more()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._read_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect_more()
        elif self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_timeout, self._cut_off, "did not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _unsupported_upgrade_warning(self) -> None:
        pass  # some clients, such as Java's, offer HTTP/2 with every request

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as HTTP, in OpenAI's form, and close: 431 (RFC 6585) for too large a head."""
        error, status = InvalidRequestError(msg, code="invalid_http"), HTTPStatus.BAD_REQUEST
        if self.conn.too_large:
            error = InvalidRequestError(
                f"URL and headers must have at most {HEAD_LIMIT} bytes", code="headers_too_large"
            )
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        body = msgspec.json.encode(error_body(error))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_more(self) -> None:
        """The client has to go on within `READ_TIMEOUT`."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = self.loop.call_later(READ_TIMEOUT, self._on_silence)

    def _on_silence(self) -> None:
        if self.flow.read_paused:  # it is us who do not read
            self._expect_more()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:  # it has never asked for anything
            self.transport.close()
        else:
            self._cut_off("fell silent in the middle of a request")

    def _cut_off(self, why: str) -> None:
        logger.warning("%s:%s %s; it is cut off", *(self.client or ("-", 0)), why)
        self.transport.abort()
