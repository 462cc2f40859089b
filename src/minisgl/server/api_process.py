"""An API process: HTTP in front of an engine. The launcher is one itself, unless `--api-workers` asks for several.

Those it starts with an `ipc.WorkerSetup` as a line on stdin. They answer with a line on stdout, an `ipc.Serving` or
`ipc.Unable`, and obey further lines: `stop`, `force`, `engine ended`. The end of stdin means that the launcher is gone.
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
from typing import BinaryIO

import msgspec
import uvicorn
from starlette.types import ASGIApp

from minisgl.config import Config
from minisgl.errors import ConfigError, EngineDeadError, MinisglError
from minisgl.server import ipc
from minisgl.server.admin import Setup
from minisgl.server.app import make_app
from minisgl.server.engine_client import EngineClient, Shutdown, wait_first
from minisgl.server.metrics import ApiProcesses, Metrics
from minisgl.server.middleware import BoundedProtocol, with_middleware
from minisgl.server.preparation import Api, Preparation
from minisgl.text.grammar_check import GrammarCompiler
from minisgl.text.tokenizer import Tokenizer, make_byte_tokenizer

BACKLOG = 2048  # connections that may wait to be accepted
ANSWER_SECONDS = 1.0  # in which requests are still answered, with 503, when the engine has ended or was given up

logger = logging.getLogger(__name__)


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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the launcher's."""
        yield


async def serve_http(
    server: HttpServer, listener: socket.socket, client: EngineClient, shutdown: Shutdown, drain_timeout: float
) -> None:
    """Serve until `shutdown.stop` or the engine's end; live requests are answered before this returns.

    After `stop` they may go on for `drain_timeout` s, or until `force`, while new ones get 503; then they end with 503.
    """
    loop, stop, force, gone = asyncio.get_running_loop(), shutdown.stop, shutdown.force, client.gone
    serving = asyncio.create_task(server.serve([listener]))
    last_bytes = ANSWER_SECONDS
    await wait_first(serving, stop.wait(), gone.wait())
    if gone.is_set():
        await wait_first(serving, stop.wait(), timeout=ANSWER_SECONDS)
    elif stop.is_set():
        deadline = loop.time() + drain_timeout
        await wait_first(client.drain(), serving, force.wait(), gone.wait(), timeout=drain_timeout)
        if client.num_live:
            logger.warning("%d requests are cut short", client.num_live)
            client.fail("the server is shutting down")
        elif client.dead is None:
            last_bytes = max(ANSWER_SECONDS, deadline - loop.time())
    server.should_exit = True
    await wait_first(serving, force.wait(), timeout=last_bytes)
    server.force_exit = True
    await serving


async def serve_api(
    config: Config,
    client: EngineClient,
    listener: socket.socket,
    shutdown: Shutdown,
    on_listening: Callable[[ipc.Serving], None],
    started: float,
    processes: ApiProcesses,
) -> None:
    """Put HTTP in front of an engine, once it is ready; `started` is on the monotonic clock. Raises ModelError."""
    ready = await client.ready()
    model, folder = ready.model, Path(ready.folder)
    if config.served_model_name:
        model = msgspec.structs.replace(model, name=config.served_model_name[0])
    has_tokenizer = not config.dummy_weight or Tokenizer.exists(folder)
    tokenizer = Tokenizer.load(folder) if has_tokenizer else make_byte_tokenizer(model.vocab_size)
    grammars = GrammarCompiler(folder, model.vocab_size, model.eos_token_ids)
    check = grammars.check if has_tokenizer else None
    preparation = Preparation(model, tokenizer, client.queue.max_live, config.served_model_name, check)
    api = Api(service=client, preparation=preparation)
    setup = Setup(config, ready.notes, ready.folder, started, processes)
    app = with_middleware(make_app(api, setup), client.metrics, config)
    serving = ipc.Serving(model.name, tokenizer.has_chat_template, has_tokenizer)
    server = HttpServer(app, lambda: on_listening(serving), config)
    try:
        await serve_http(server, listener, client, shutdown, config.drain_timeout)
    finally:
        grammars.close()


async def serve_worker(setup: ipc.WorkerSetup, stdin: BinaryIO, stdout: BinaryIO) -> int:
    """Serve as one of several until told to stop; the exit status."""
    config, metrics, processes = setup.config, Metrics(setup.folder), ApiProcesses(setup.folder)
    client = EngineClient(*ipc.addresses(setup.folder, setup.link), config, link=setup.link, metrics=metrics)
    shutdown = Shutdown()

    def say(message: ipc.Serving | ipc.Unable) -> None:
        stdout.write(msgspec.json.encode(message) + b"\n")

    async def obey() -> None:
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), stdin)
        while order := await lines.readline():
            if order == b"engine ended\n":
                client.fail()
            else:
                shutdown.stop.set()
            if order == b"force\n":
                shutdown.force.set()
        os._exit(1)

    tasks = [asyncio.create_task(obey()), asyncio.create_task(processes.beat())]
    try:
        listener = socket.socket(fileno=setup.listener)
        await serve_api(config, client, listener, shutdown, say, setup.started, processes)
    except EngineDeadError:
        return 1
    except MinisglError as error:
        say(ipc.Unable(error.message))
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
    level = setup.config.log_level
    logging.basicConfig(level=level, format=f"%(asctime)s %(levelname)s api-{setup.row} %(name)s: %(message)s")
    if level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")
    return asyncio.run(serve_worker(setup, stdin, stdout))


if __name__ == "__main__":
    sys.exit(main())
