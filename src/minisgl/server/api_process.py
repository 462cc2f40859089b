"""An API process: HTTP in front of an engine. The launcher is one itself, unless `--api-workers` asks for several.

Those it starts with a `WorkerSetup` as a line of JSON on stdin. They answer with a line on stdout, a `Serving` or an
`Unable`, and obey further lines: `stop` (drain), `force` (at once), `engine ended`. The end of stdin means that the
launcher is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import uvicorn
from starlette.types import ASGIApp

from minisgl.config import Config
from minisgl.errors import ConfigError, EngineDeadError, MinisglError
from minisgl.grammar.compiler import GrammarCompiler
from minisgl.server.admin import Setup
from minisgl.server.app import make_app
from minisgl.server.engine_client import EngineClient, Limits
from minisgl.server.metrics import ApiProcesses, Metrics
from minisgl.server.middleware import BoundedProtocol, with_middleware
from minisgl.server.preparation import Api, Preparation
from minisgl.server.process_messages import Serving, Unable, WorkerSetup
from minisgl.tokenizer.standin import make_standin
from minisgl.tokenizer.tokenizer import Tokenizer

BACKLOG = 2048
"""Connections that may wait to be accepted."""
ANSWER_SECONDS = 1.0
"""How long requests are still answered, with 503, after the engine has ended or was given up."""

logger = logging.getLogger(__name__)


def listen(listener: socket.socket, write_timeout: float) -> None:
    """Take connections. What a client that vanished has not acknowledged after `write_timeout` s is given up.

    Raises ConfigError when another process took the port while the model loaded.
    """
    # Connections inherit it (RFC 5482).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_timeout * 1000))
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on the port any more: {error.strerror}") from error


class HttpServer(uvicorn.Server):
    """A uvicorn server that says when it listens and leaves the signals to us."""

    def __init__(self, app: ASGIApp, on_listening: Callable[[], None], config: Config) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(BoundedProtocol, write_timeout=config.write_timeout),  # type: ignore[arg-type]
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                # asyncio accepts so many at a time: one of several processes is not to take a whole burst.
                backlog=BACKLOG if config.api_workers == 1 else 1,
            )
        )
        self._write_timeout = config.write_timeout
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so. Raises ConfigError when another process took the port while the model loaded."""
        assert sockets is not None
        for listener in sockets:
            listen(listener, self._write_timeout)
        await super().startup(sockets)
        for listener in sockets:
            listen(listener, self._write_timeout)  # asyncio has set its own backlog
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the launcher's."""
        yield


async def serve_http(
    server: HttpServer,
    listener: socket.socket,
    client: EngineClient,
    engine_ended: asyncio.Future[Any],
    stop: asyncio.Event,
    force: asyncio.Event,
    drain_timeout: float,
) -> None:
    """Serve until `stop` is set or the engine ends; live requests are answered before this returns.

    After `stop` they may go on for `drain_timeout` s, or until `force`, while new ones get 503; then they end with 503.
    """
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(server.serve([listener]))
    stopped, forced = asyncio.create_task(stop.wait()), asyncio.create_task(force.wait())
    drained: asyncio.Task[None] | None = None
    try:
        await asyncio.wait((serving, stopped, engine_ended), return_when=asyncio.FIRST_COMPLETED)
        deadline = loop.time() + drain_timeout
        if engine_ended.done():
            await asyncio.wait((serving, stopped), timeout=ANSWER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        elif stopped.done():
            drained = asyncio.create_task(client.drain())
            over = (drained, serving, forced, engine_ended)
            await asyncio.wait(over, timeout=drain_timeout, return_when=asyncio.FIRST_COMPLETED)
            if not drained.done():
                logger.warning("%d requests are cut short", client.num_live)
                client.fail("the server is shutting down")
        server.should_exit = True
        last_bytes = max(ANSWER_SECONDS, deadline - loop.time()) if drained and client.dead is None else ANSWER_SECONDS
        await asyncio.wait((serving, forced), timeout=last_bytes, return_when=asyncio.FIRST_COMPLETED)
        server.force_exit = True
        await serving
    finally:
        for task in (stopped, forced, drained):
            if task is not None:
                task.cancel()


async def serve_api(
    config: Config,
    client: EngineClient,
    listener: socket.socket,
    engine_ended: asyncio.Future[Any],
    stop: asyncio.Event,
    force: asyncio.Event,
    on_listening: Callable[[Serving], None],
    started: float,
    processes: ApiProcesses,
) -> None:
    """Put HTTP in front of an engine, once it is ready; the rest is as in `serve_http`. Raises ModelError."""
    ready = await client.ready()
    model, folder = ready.model, Path(ready.folder)
    if config.served_model_name:
        model = msgspec.structs.replace(model, name=config.served_model_name[0])
    has_tokenizer = not config.dummy_weight or Tokenizer.exists(folder)
    tokenizer = Tokenizer.load(folder) if has_tokenizer else make_standin(model.vocab_size)
    grammars = GrammarCompiler(folder, model.vocab_size, model.eos_token_ids)
    check = grammars.check if has_tokenizer else None
    preparation = Preparation(model, tokenizer, client.limits.live, config.served_model_name, check)
    api = Api(service=client, preparation=preparation)
    setup = Setup(config, ready.notes, ready.folder, started, processes)
    app = with_middleware(make_app(api, setup), client.metrics, config)
    serving = Serving(model.name, tokenizer.has_chat_template, has_tokenizer)
    server = HttpServer(app, lambda: on_listening(serving), config)
    try:
        await serve_http(server, listener, client, engine_ended, stop, force, config.drain_timeout)
    finally:
        grammars.close()


async def serve_worker(setup: WorkerSetup, stdin: BinaryIO, stdout: BinaryIO) -> int:
    """Serve as one of several until told to stop; the exit status."""
    config, metrics, processes = setup.config, Metrics(Path(setup.counts)), ApiProcesses(Path(setup.beats))
    client = EngineClient(setup.to_engine, setup.from_engine, Limits.of(config), setup.link, metrics)
    stop, force = asyncio.Event(), asyncio.Event()
    engine_ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def say(message: Serving | Unable) -> None:
        stdout.write(msgspec.json.encode(message) + b"\n")

    async def obey() -> None:
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), stdin)
        while order := await lines.readline():
            if order == b"engine ended\n":
                client.fail()
                engine_ended.set_result(None)
            else:
                stop.set()
            if order == b"force\n":
                force.set()
        os._exit(1)

    tasks = [asyncio.create_task(obey()), asyncio.create_task(processes.beat())]
    try:
        listener = socket.socket(fileno=setup.listener)
        await serve_api(config, client, listener, engine_ended, stop, force, say, setup.started, processes)
    except EngineDeadError:
        return 1
    except MinisglError as error:
        say(Unable(error.message))
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
    setup = msgspec.json.decode(stdin.readline(), type=WorkerSetup)
    level = setup.config.log_level
    logging.basicConfig(level=level, format=f"%(asctime)s %(levelname)s api-{setup.row} %(name)s: %(message)s")
    if level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")
    return asyncio.run(serve_worker(setup, stdin, stdout))


if __name__ == "__main__":
    sys.exit(main())
