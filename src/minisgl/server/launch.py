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
from typing import TYPE_CHECKING

from minisgl import __version__
from minisgl.config import BUNDLED_MODEL, Config, check
from minisgl.engine.messages import Ready
from minisgl.errors import EngineDeadError
from minisgl.server.child import ENGINE_COMMAND, EngineProcess, describe_status, launch_engine
from minisgl.server.listen import address, check_certificate, check_public, listen, listen_socket

if TYPE_CHECKING:
    from minisgl.server.api_worker import ApiWorker


def serve(config: Config, command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until SIGINT or SIGTERM. `command` starts the engine's process.

    Raises ConfigError when the port is taken, ModelError when the model cannot be served, EngineDeadError when the
    engine dies.
    """
    check(config)
    check_certificate(config)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if config.log_level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")  # it would say what we say ourselves
    asyncio.run(run(config, command))


async def run(config: Config, command: Sequence[str]) -> None:
    """The whole life of a server, in one event loop."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    with listen_socket(config.host, config.port) as listener, handle_signals(stop, hurry):
        check_public(config, listener)
        started = time.monotonic()
        tell(f"loading {config.model or BUNDLED_MODEL} …")
        launching = asyncio.create_task(launch_engine(config, still_loading, command))
        spares: list[ApiWorker] = []
        try:
            # What speaks HTTP gets ready while the engine's process loads.
            await (asyncio.to_thread(import_http) if config.api_workers == 1 else start_spares(config, spares))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((launching, stopped), return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not launching.done():
                return
            engine, ready = launching.result()
            try:
                if config.api_workers == 1:
                    await serve_engine(config, listener, engine, ready, started, stop, hurry)
                else:
                    await serve_fleet(config, listener, engine, ready, started, stop, hurry, spares)
            finally:
                status = await engine.stop()
            if not stop.is_set():
                raise EngineDeadError(f"the engine process ended with {describe_status(status)}")
        finally:
            launching.cancel()
            await asyncio.wait((launching,))
            await asyncio.gather(*(spare.stop() for spare in spares))


async def start_spares(config: Config, spares: list[ApiWorker]) -> None:
    """Start the API processes of a server that has several."""
    from minisgl.server import fleet

    await fleet.start_spares(config.api_workers, spares)


def import_http() -> None:
    """Import what `serve_engine` needs; it takes a good part of a second."""
    import minisgl.server.front
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
    """Put HTTP in front of an engine that is ready; `started` is when start-up began, on the monotonic clock."""
    from minisgl.server.front import open_front
    from minisgl.server.http import HttpServer, serve_http
    from minisgl.server.status import report_status

    service = engine.service
    async with open_front(config, service, ready, started=started) as front:
        if front.standin:
            tell_of_standin(ready.folder)

        def on_listening() -> None:
            announce(config, address(listener, config), ready.notes, front.api.model.name, front.chats, started)

        server = HttpServer(front.app, on_listening, config)
        status = asyncio.create_task(report_status(service))
        try:
            await serve_http(server, [listener], service, engine.ended, stop, hurry, config.drain_timeout)
        finally:
            status.cancel()


async def serve_fleet(
    config: Config,
    listener: socket.socket,
    engine: EngineProcess,
    ready: Ready,
    started: float,
    stop: asyncio.Event,
    hurry: asyncio.Event,
    spares: list[ApiWorker],
) -> None:
    """Put several API processes in front of an engine that is ready; `spares` are some that run already.

    `started` is as above. Raises ApiProcessError.
    """
    from minisgl.server.fleet import Fleet
    from minisgl.server.status import report_status

    starting = asyncio.create_task(Fleet.start(config, engine, started, spares))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopped, engine.ended), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        stopped.cancel()
        await asyncio.wait((starting,))
        return
    fleet, serving = starting.result()
    status = asyncio.create_task(report_status(engine.service, live=lambda: fleet.num_live))
    listener.setblocking(False)
    listen(listener, config.write_timeout)
    placing = asyncio.create_task(fleet.place(listener))
    try:
        if serving.standin:
            tell_of_standin(ready.folder)
        announce(config, address(listener, config), ready.notes, serving.model, serving.chats, started)
        await asyncio.wait((stopped, engine.ended, fleet.failed), return_when=asyncio.FIRST_COMPLETED)
        if stopped.done() and not engine.ended.done():
            await fleet.drain(hurry, config.drain_timeout)
        else:
            await fleet.give_up()
        if fleet.failed.done():
            fleet.failed.result()
    finally:
        for task in (placing, status, stopped):
            task.cancel()
        await fleet.close()


@contextlib.contextmanager
def handle_signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, the second `hurry`."""

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        else:
            stop.set()
            tell("stopping; once more to stop at once")

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def announce(config: Config, url: str, notes: Sequence[str], model: str, chats: bool, started: float) -> None:
    """The ready line, the effective configuration and a request to paste; `started` is on the monotonic clock."""
    question = "What is the capital of France?"
    path, body = (
        ("chat/completions", {"messages": [{"role": "user", "content": question}]})
        if chats
        else ("completions", {"prompt": "The capital of France is"})
    )
    seconds = time.monotonic() - started
    print(f"\nMini-SGLang {__version__} is ready after {seconds:.1f} s: {model} on {url}/v1\n")
    for note in notes:
        print(f"  {note}")
    headers = "-H 'Content-Type: application/json'"
    if config.api_key:
        print(f"  api_key = {len(config.api_key)} set: clients send one as 'Authorization: Bearer KEY'")
        headers += ' -H "Authorization: Bearer $MINISGL_API_KEY"'
    if chats:
        print(f"\nchat in a browser: {url}/")
    print(f"\ncurl {url}/v1/{path} {headers} \\\n  -d '{json.dumps(body)}'\n", flush=True)


def tell_of_standin(folder: str) -> None:
    """Tell what text is where the model has no tokenizer."""
    tell(f"{folder} has no tokenizer: text is bytes, and any other token reads as its number")


def still_loading(seconds: float) -> None:
    """Tell that it takes a while, now for so many seconds."""
    tell(f"still loading after {seconds:.0f} s …")


def tell(line: str) -> None:
    """A line about what is going on, to stderr: stdout is for what the user asked for. Nobody need be there to read."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
