"""`serve`: one process for HTTP, one for the engine, and what the user sees of both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from minisgl import __version__
from minisgl.config import BUNDLED_MODEL, Config, check
from minisgl.engine.messages import Ready
from minisgl.errors import ConfigError, EngineDeadError
from minisgl.server.child import ENGINE_COMMAND, EngineProcess, describe_status, launch_engine


def serve(config: Config, command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until SIGINT or SIGTERM. `command` starts the engine's process.

    Raises ConfigError when the port is taken, ModelError when the model cannot be served, EngineDeadError when the
    engine dies.
    """
    check(config)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run(config, command))


async def run(config: Config, command: Sequence[str]) -> None:
    """The whole life of a server, in one event loop."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    with listen_socket(config.host, config.port) as listener, handle_signals(stop, hurry):
        started = time.perf_counter()
        tell(f"loading {config.model or BUNDLED_MODEL} …")
        launching = asyncio.create_task(launch_engine(config, still_loading, command))
        stopped = asyncio.create_task(stop.wait())
        # The HTTP side is imported while the engine's process loads.
        await asyncio.to_thread(import_http)
        await asyncio.wait((launching, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not launching.done():
            launching.cancel()
            await asyncio.wait((launching,))
            return
        engine, ready = launching.result()
        try:
            await serve_engine(config, listener, engine, ready, started, stop, hurry)
        finally:
            status = await engine.stop()
        if not stop.is_set():
            raise EngineDeadError(f"the engine process ended with {describe_status(status)}")


def import_http() -> None:
    """Import what `serve_engine` needs; it takes a good part of a second."""
    import minisgl.server.app
    import minisgl.server.http  # noqa: F401


async def serve_engine(
    config: Config,
    listener: socket.socket,
    engine: EngineProcess,
    ready: Ready,
    started: float,
    stop: asyncio.Event,
    hurry: asyncio.Event,
) -> None:
    """Put HTTP in front of an engine that is ready; `started` is when start-up began, on the performance counter."""
    from minisgl.server.app import create_app
    from minisgl.server.http import HttpServer, serve_http
    from minisgl.tokenizer.standin import make_standin
    from minisgl.tokenizer.tokenizer import Tokenizer

    folder = Path(ready.folder)
    if config.dummy_weight and not Tokenizer.exists(folder):
        tell(f"{folder} has no tokenizer: text is bytes, and any other token reads as its number")
        tokenizer = make_standin(ready.model.vocab_size)
    else:
        tokenizer = Tokenizer.load(folder)

    def on_listening() -> None:
        announce(address(listener), ready, tokenizer.has_chat_template, time.perf_counter() - started)

    app = create_app(engine.service, ready.model, tokenizer)
    server = HttpServer(app, on_listening, debug=config.log_level == "DEBUG")
    await serve_http(server, listener, engine.service, engine.ended, stop, hurry)


def listen_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address and not listening yet: taken before the model is loaded, answering after.

    Raises ConfigError when the address cannot be had.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return listener


@contextlib.contextmanager
def handle_signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, the second `hurry`."""

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        else:
            tell("stopping; once more to stop at once")
            stop.set()

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def address(listener: socket.socket) -> str:
    """The URL to reach a bound socket from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(url: str, ready: Ready, chats: bool, seconds: float) -> None:
    """The ready line, the effective configuration and a request to paste; start-up took `seconds`."""
    question = "What is the capital of France?"
    path, body = (
        ("chat/completions", {"messages": [{"role": "user", "content": question}]})
        if chats
        else ("completions", {"prompt": "The capital of France is"})
    )
    print(f"\nMini-SGLang {__version__} is ready after {seconds:.1f} s: {ready.model.name} on {url}/v1\n")
    for note in ready.notes:
        print(f"  {note}")
    print(f"\ncurl {url}/v1/{path} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'\n", flush=True)


def still_loading(seconds: float) -> None:
    """Tell that it takes a while, now for so many seconds."""
    tell(f"still loading after {seconds:.0f} s …")


def tell(line: str) -> None:
    """A line about what is going on, to stderr: stdout is for what the user asked for."""
    print(line, file=sys.stderr, flush=True)
