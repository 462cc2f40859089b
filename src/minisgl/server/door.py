"""What every HTTP request passes before it reaches an endpoint: its id and its log line, CORS, the API key, HEAD."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minisgl.config import Config
from minisgl.server.errors import UnauthorizedError, error_body, error_headers
from minisgl.server.metrics import Metrics
from minisgl.server.records import EXCHANGE, Exchange
from minisgl.server.responses import json_response

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""What needs no key: what a load balancer asks, and the page, which asks its reader for one."""
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""What machines ask every few seconds; it is logged at DEBUG."""

logger = logging.getLogger("minisgl.access")


class Logged:
    """Gives each request an id, its own or the client's X-Request-Id, and a line in the log when it is answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and note what became of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = begin(scope)
        header = (b"x-request-id", exchange.id.encode())

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        token = EXCHANGE.set(exchange)
        try:
            await self.app(scope, receive, send_noting)
        finally:
            EXCHANGE.reset(token)
            self.metrics.on_response(exchange, getattr(scope.get("route"), "path", "unmatched"))
            level = logging.DEBUG if exchange.path in QUIET_PATHS else logging.INFO
            logger.log(level, "%s", exchange.describe(time.monotonic()))


def begin(scope: Scope) -> Exchange:
    """The record of a request that has just come."""
    said = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
    request_id = said if re.fullmatch(r"[\x21-\x7e]{1,128}", said) else uuid.uuid4().hex
    host, port = scope.get("client") or ("-", 0)
    path = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
    return Exchange(request_id, scope["method"], path[:256], f"{host}:{port}")


class Guarded:
    """Lets a request through when it has one of the keys as its bearer token (RFC 6750)."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.digests = [digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self.allows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = UnauthorizedError("this server asks for an API key: send it as 'Authorization: Bearer KEY'")
        await json_response(error_body(error), error.status, error_headers(error))(scope, receive, send)

    def allows(self, headers: Headers) -> bool:
        """Whether a key is right; the time says nothing about the keys, not even their lengths."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        shown = digest(key.strip())
        right = [hmac.compare_digest(shown, known) for known in self.digests]
        return any(right) and scheme.lower() == "bearer"


class HeadAsGet:
    """Answers HEAD as GET (RFC 9110, 9.3.2), which monitors send; uvicorn leaves the body away."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, and the route that it found back, even where its endpoint fails."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}  # uvicorn looks at its own
        try:
            await self.app(asked, receive, send)
        finally:
            scope["route"] = asked.get("route")


def digest(key: str) -> bytes:
    """A key as something of fixed length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def with_door(app: ASGIApp, metrics: Metrics, config: Config) -> ASGIApp:
    """The application behind what the configuration asks of every request."""
    app = HeadAsGet(app)
    if config.api_key:
        app = Guarded(app, config.api_key)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    return Logged(app, metrics)
