"""HTTP in front of an engine: in the launcher or, with `--api-workers`, in processes of its own.

Those get an `ipc.WorkerSetup` on stdin, say an `ipc.Serving` on stdout, and obey `stop` and `force`.
"""

import asyncio
import contextlib
import functools
import hashlib
import hmac
import logging
import os
import re
import resource
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Literal

import h11
import msgspec
import uvicorn
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from minisgl.config import Config
from minisgl.errors import ConfigError, EngineDeadError, InvalidRequestError, MinisglError
from minisgl.server import ipc
from minisgl.server.app import make_app
from minisgl.server.engine_client import EngineClient, Shutdown, SocketEngineClient, wait_first
from minisgl.server.errors import ForbiddenError, OverloadedError, UnauthorizedError, error_response
from minisgl.server.metrics import ACCESS_RECORD, AccessRecord, Metrics
from minisgl.server.preparation import Api, Preparation
from minisgl.text.grammar_check import GrammarChecker
from minisgl.text.tokenizer import Tokenizer, make_byte_tokenizer

OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # without a key: for load balancers; the page asks for one
# asked every few seconds, logged at DEBUG
QUIET_PATHS = frozenset({"/health", "/health_generate", "/ready", "/metrics", "/load", "/v1/loads"})
HEAD_LIMIT = 64 * 2**10  # bytes of the request line and the headers
HOST = re.compile(r"([^:\[\]]+|\[[\da-f:.]+\])(:\d*)?")
ABSOLUTE_TARGET = re.compile(rb"https?://([^/?#]+)", re.IGNORECASE)
READ_TIMEOUT = 30.0  # seconds between two pieces of a request
KEEP_ALIVE = 75  # s between two requests: longer than clients and proxies keep a connection, which then close it first
BACKLOG = 2048  # connections that may wait to be accepted
ACCEPTED_AT_ONCE = 16
MAX_CONNECTIONS = 16384  # of a process; an idle one takes some 20 KB
SPARE_DESCRIPTORS = 128  # for connections that are refused and for what is no connection
REFUSED_AT_ONCE = 32  # connections that are told so
CROWD_SECONDS = 60.0  # between two lines in the log about too many connections
ANSWER_SECONDS = 1.0  # in which requests are still answered, with 503, when the engine has ended or was given up

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("minisgl.access")


class AccessLog:
    """Gives each request an id, its own or the client's X-Request-Id, and a line in the log when it is answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid.uuid4().hex
        host, port = scope.get("client") or ("-", 0)
        path = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
        scope["path"] = scope["path"].rstrip("/") or "/"  # an endpoint may be written with slashes behind it
        record = AccessRecord(request_id, scope["method"], path[:256], f"{host}:{port}")
        header = (b"x-request-id", request_id.encode())

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                # Counted first: a client may ask another process for the counts as soon as it is answered.
                self.metrics.on_response(record, getattr(scope.get("route"), "path", "unmatched"))
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        ACCESS_RECORD.set(record)  # each request has a task of its own
        try:
            await self.app(scope, receive, send_noting)
        finally:
            level = logging.DEBUG if record.path in QUIET_PATHS else logging.INFO
            access_logger.log(level, "%s", record.describe(time.monotonic()))


class HostGuard:
    """Refuses a Host that is no name of this server, which a web page has reached by DNS rebinding."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self.app = app
        own = f"[{config.host}]" if ":" in config.host else config.host
        names = ("localhost", "127.0.0.1", "[::1]", own, *config.allowed_hosts)
        self.names = frozenset(name.lower() for name in names)
        self.domains = tuple(name[1:] for name in self.names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host")  # HTTP/1.0 has none, and no web page speaks that
        if host is None or self.allows(host):
            await self.app(scope, receive, send)
            return
        rule = "is no name of this server; --allowed-hosts NAME allows more"
        error = ForbiddenError(f"the Host {host[:256]!r} {rule}", code="host_not_allowed")
        await error_response(error)(scope, receive, send)

    def allows(self, host: str) -> bool:
        match = HOST.fullmatch(host.lower())
        return match is not None and (match[1] in self.names or match[1].endswith(self.domains))


class KeyGuard:
    """Lets a request through when it has one of the keys as its bearer token (RFC 6750), else answers 401."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.digests = [digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["api_key"] = number = self.key_number(Headers(scope=scope))
        if number or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        error = UnauthorizedError("this server asks for an API key: send it as 'Authorization: Bearer KEY'")
        await error_response(error)(scope, receive, send)

    def key_number(self, headers: Headers) -> int:
        """Which key was sent, 0: none. The time it takes says nothing about the keys, not even their lengths."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = digest(key.strip())
        right = [hmac.compare_digest(given, known) for known in self.digests]
        return right.index(True) + 1 if any(right) and scheme.lower() == "bearer" else 0


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def with_middleware(app: ASGIApp, metrics: Metrics, config: Config) -> ASGIApp:
    if config.api_key:
        app = KeyGuard(app, config.api_key)
    if config.cors_origins:
        exposed, methods = ("X-Request-Id", "Retry-After"), ("GET", "POST")
        app = CORSMiddleware(app, config.cors_origins, methods, allow_headers=("*",), expose_headers=exposed)
    if "*" not in config.allowed_hosts and (config.allowed_hosts or not (config.api_key or config.allow_public)):
        app = HostGuard(app, config)
    return AccessLog(app, metrics)


class BoundedConnection(h11.Connection):
    """h11's part of a connection, with a bound on every head; h11's own is on those that come in pieces. The head of an
    answer is held back until the first part of its body, so that one packet has both.
    """

    held = b""

    def send(self, event: h11.Event) -> bytes:  # type: ignore[override]
        data = self.held + (super().send(event) or b"")
        self.held = data if isinstance(event, h11.Response) else b""
        return b"" if self.held else data

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        before = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        if before - len(self.trailing_data[0]) > HEAD_LIMIT:
            raise h11.RemoteProtocolError("too large a head", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return as_rfc_9112(event)


def as_rfc_9112(request: h11.Request) -> h11.Request:
    """RFC 9112: an absolute target names the Host (3.2.2); a body of both length and encoding is the last one (6.1)."""
    headers, target = request.headers, request.target
    names = {name.lower() for name, _ in headers.raw_items()}
    twice = b"transfer-encoding" in names and b"content-length" in names
    absolute = None if target.startswith(b"/") else ABSOLUTE_TARGET.match(target)
    if not (twice or absolute):
        return request
    changed = [(b"connection", b"close")] if twice else []
    if absolute is not None:
        changed.append((b"host", absolute[1]))
        target = b"/" + target[absolute.end() :].removeprefix(b"/")
    kept = [(name, value) for name, value in headers if name != b"host" or absolute is None]
    return h11.Request(method=request.method, target=target, headers=kept + changed, http_version=request.http_version)


class Crowd:
    """As many connections as the process may have descriptors. From there on a new one takes the place of the one that
    has been `idle`, without a request, for longest. Without such a one it is told 503, or closed where many are.
    """

    def __init__(self) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.bound = min(MAX_CONNECTIONS, max(most - SPARE_DESCRIPTORS, most // 2))
        self.idle: dict[BoundedProtocol, None] = {}  # the oldest first
        self._next_line = 0.0

    def enter(self, connection: "BoundedProtocol", count: int) -> None:
        """Take in a new connection, the last of `count`."""
        if count > self.bound:
            if (now := time.monotonic()) >= self._next_line:
                logger.warning("more than %d connections: idle ones are closed, or new ones refused", self.bound)
                self._next_line = now + CROWD_SECONDS
            if not self.idle:
                error = OverloadedError("too many connections; try again later")
                connection.app = error_response(error, connection="close")
                if count > self.bound + REFUSED_AT_ONCE:
                    connection.transport.abort()
                return
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.close()
        self.idle[connection] = None


class BoundedProtocol(H11Protocol):
    """With bounds on time: who sends no more, or does not read in `write_timeout` s, is cut off as if it had left."""

    def __init__(self, *args: Any, write_timeout: float, crowd: Crowd, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: BoundedConnection = BoundedConnection(h11.SERVER, HEAD_LIMIT)
        self.write_timeout = write_timeout
        self.crowd = crowd
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_more()
        self.crowd.enter(self, len(self.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.idle.pop(self, None)
        self._stop_timer("read")
        self._stop_timer("write")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        state = self.conn.their_state
        if self.cycle is not None and not self.cycle.response_complete:
            self.crowd.idle.pop(self, None)
        if state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect_more()
        else:
            self._stop_timer("read")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # a pipelined request may have begun
            self.crowd.idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._timers["write"] = self.loop.call_later(self.write_timeout, self._cut_off, "did not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer("write")

    def _unsupported_upgrade_warning(self) -> None:
        pass  # some clients, such as Java's, offer HTTP/2 with every request

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be read as HTTP, in OpenAI's form, and close: 431 (RFC 6585) for too large a head."""
        code, status = "invalid_http", HTTPStatus.BAD_REQUEST
        error = sys.exception()  # uvicorn calls this while it handles what h11 raised
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            code, status = "headers_too_large", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            msg = f"URL and headers must have at most {HEAD_LIMIT} bytes"
        response = error_response(InvalidRequestError(msg, code=code), connection="close")
        head = h11.Response(status_code=status, headers=response.raw_headers, reason=status.phrase.encode())
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_more(self) -> None:
        self._stop_timer("read")
        self._timers["read"] = self.loop.call_later(READ_TIMEOUT, self._on_silence)

    def _stop_timer(self, name: Literal["read", "write"]) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

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


class HttpServer(uvicorn.Server):
    def __init__(self, app: ASGIApp, on_listening: Callable[[], None], config: Config) -> None:
        protocol: Any = functools.partial(BoundedProtocol, write_timeout=config.write_timeout, crowd=Crowd())
        tls: dict[str, Any] = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
        off: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "off"}
        # asyncio accepts so many at a time: one of several processes is not to take a whole burst.
        backlog = ACCEPTED_AT_ONCE if config.api_workers == 1 and config.ssl_certfile is None else 1
        options: dict[str, Any] = {"http": protocol, "ws": "none", "timeout_keep_alive": KEEP_ALIVE, **tls, **off}
        super().__init__(uvicorn.Config(app, backlog=backlog, **options))
        self._write_timeout, self._on_listening = config.write_timeout, on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so. Raises ConfigError when another process took the port while the model loaded."""
        for listener in sockets or ():
            # What a client that vanished has not acknowledged in time is given up; connections inherit it (RFC 5482).
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._write_timeout * 1000))
        try:
            await super().startup(sockets)
            for listener in sockets or ():
                listener.listen(BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on the port any more: {error.strerror}") from error
        self._on_listening()

    @contextlib.contextmanager  # signals are the launcher's
    def capture_signals(self) -> Iterator[None]:
        yield


def build_app(config: Config, client: EngineClient, ready: ipc.Ready, started: float) -> tuple[ASGIApp, ipc.Serving]:
    """The application in front of an engine, without its middleware; `started` is on the monotonic clock."""
    model, folder = ready.model, Path(ready.folder)
    has_tokenizer = not config.dummy_weight or Tokenizer.exists(folder)
    tokenizer = Tokenizer.load(folder) if has_tokenizer else make_byte_tokenizer(model.vocab_size)
    grammars = GrammarChecker(folder, model.vocab_size, model.eos_token_ids)
    check = grammars.checker if has_tokenizer else None
    preparation = Preparation(model, tokenizer, client.queue.max_live, config.served_model_name, check)
    app = make_app(Api(client, preparation, config, ready.notes, ready.folder, started))
    return app, ipc.Serving(preparation.names[0], tokenizer.chat_template is not None, has_tokenizer)


async def serve_api(
    config: Config,
    client: SocketEngineClient,
    listener: socket.socket,
    shutdown: Shutdown,
    started: float,
    say: Callable[[ipc.Serving], None],
) -> None:
    """Put HTTP in front of an engine, once it is ready, until `shutdown.stop` or the engine's end. After `stop` live
    requests may go on for the drain timeout, or until `force`, while new ones get 503; then they end with 503.
    `started` is on the monotonic clock. Raises ModelError.
    """
    ready = await client.ready()
    app, said = build_app(config, client, ready, started)
    server = HttpServer(with_middleware(app, client.metrics, config), lambda: say(said), config)
    loop, stop, force, gone = asyncio.get_running_loop(), shutdown.stop, shutdown.force, client.gone
    serving = asyncio.create_task(server.serve([listener]))
    last_bytes = ANSWER_SECONDS
    await wait_first(serving, stop.wait(), gone.wait())
    if gone.is_set():
        await wait_first(serving, stop.wait(), timeout=ANSWER_SECONDS)
    elif stop.is_set():
        deadline = loop.time() + config.drain_timeout
        await wait_first(client.drain(), serving, force.wait(), gone.wait(), timeout=config.drain_timeout)
        if client.num_live:
            logger.warning("%d requests are cut short", client.num_live)
            client.fail("the server is shutting down")
        elif client.dead is None:
            last_bytes = max(ANSWER_SECONDS, deadline - loop.time())
    server.should_exit = True
    await wait_first(serving, force.wait(), timeout=last_bytes)
    server.force_exit = True
    await serving


async def serve_worker(setup: ipc.WorkerSetup, stdin: BinaryIO, stdout: BinaryIO) -> int:
    metrics, shutdown = Metrics(setup.counts, setup.config.metrics_prefix), Shutdown()
    client = SocketEngineClient(setup.folder, setup.config, metrics=metrics)

    def say(serving: ipc.Serving) -> None:
        stdout.write(msgspec.json.encode(serving) + b"\n")

    async def obey() -> None:
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), stdin)
        while order := await lines.readline():
            shutdown.stop.set()
            if order == b"force\n":
                shutdown.force.set()
        os._exit(1)  # the launcher is gone

    tasks = [asyncio.create_task(obey()), asyncio.create_task(metrics.beat())]
    try:
        listener = socket.socket(fileno=setup.listener)
        await serve_api(setup.config, client, listener, shutdown, setup.started, say)
    except MinisglError as error:
        if not isinstance(error, EngineDeadError):
            say(ipc.Serving(error=error.message))
        return 1
    finally:
        for task in tasks:
            task.cancel()
        await client.close()
    return 0


def main() -> int:
    """Entry point of `python -m minisgl.server.api_process`. What libraries print goes to stderr."""
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    stdin = os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    setup = msgspec.json.decode(stdin.readline(), type=ipc.WorkerSetup)
    ipc.start_logging(setup.config, f"api-{setup.row} ")
    return asyncio.run(serve_worker(setup, stdin, stdout))


if __name__ == "__main__":
    sys.exit(main())
