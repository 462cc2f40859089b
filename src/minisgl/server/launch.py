"""`serve`: the launcher, which has the listening socket, the engine process and what the user sees of both.

It speaks HTTP itself, or with `--api-workers` leaves that to processes that all accept from its socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import ipaddress
import itertools
import json
import logging
import signal
import socket
import ssl
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
from prometheus_client.multiprocess import mark_process_dead

from minisgl import __version__
from minisgl.config import BUNDLED_MODEL, Config, check, environment_with
from minisgl.core.types import EngineStats
from minisgl.errors import ConfigError, EngineDeadError, ModelError
from minisgl.server import ipc
from minisgl.server.engine_client import (
    ENGINE_COMMAND,
    EngineClient,
    EngineProcess,
    Shutdown,
    describe_status,
    end_process,
    wait_first,
)
from minisgl.server.errors import ApiProcessError
from minisgl.server.metrics import ApiProcesses, share

WORKER_COMMAND = (sys.executable, "-m", "minisgl.server.api_process")
MOST_DEATHS, DEATHS_SECONDS = 5, 60.0  # with one death more of an API process in that time the server ends
LAST_SECONDS = 2.0  # for API processes to end when nothing is answered any more but with an error
LOADING_SECONDS = STATUS_SECONDS = 5.0

logger = logging.getLogger(__name__)
status_logger = logging.getLogger("minisgl.status")


def serve(config: Config, command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until SIGINT or SIGTERM. `command` starts the engine's process.

    Raises ConfigError when the port is taken, ModelError when the model cannot be served, EngineDeadError when the
    engine dies, ApiProcessError when API processes die again and again.
    """
    check(config)
    check_certificate(config)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if config.log_level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")  # it would say what we say ourselves
    asyncio.run(run(config, command))


async def run(config: Config, command: Sequence[str]) -> None:
    """The whole life of a server, in one event loop."""
    with listen_socket(config.host, config.port) as listener, handle_signals() as shutdown:
        check_public(config, listener)
        started, stop = time.monotonic(), shutdown.stop
        print_status(f"loading {config.model or BUNDLED_MODEL} …")
        engine = await EngineProcess.start(config, command)
        loading = asyncio.create_task(engine.ready())
        status: asyncio.Task[None] | None = None
        workers: ApiWorkers | None = None
        try:
            # What speaks HTTP gets ready while the engine loads.
            if config.api_workers == 1:
                await asyncio.to_thread(importlib.import_module, "minisgl.server.api_process")
            else:
                workers = ApiWorkers(config, engine, listener, started)
            while not loading.done() and not stop.is_set():
                await wait_first(loading, stop.wait(), timeout=LOADING_SECONDS)
                if not loading.done() and not stop.is_set():
                    print_status(f"still loading after {time.monotonic() - started:.0f} s …")
            if stop.is_set():
                return
            ready = loading.result()
            status = asyncio.create_task(report_status(engine.client))

            def on_listening(serving: ipc.Serving) -> None:
                announce(config, address(listener, config), ready, serving, started)

            if workers is None:
                from minisgl.server.api_process import serve_api

                await serve_api(config, engine.client, listener, shutdown, on_listening, started, ApiProcesses())
            else:
                await workers.serve(shutdown, on_listening)
        finally:
            if status is not None:
                status.cancel()
            if workers is not None:
                await workers.close()
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            exit_status = await engine.stop()
        if not stop.is_set():
            raise EngineDeadError(f"the engine process ended with {describe_status(exit_status)}")


class ApiWorkers:
    """Several API processes that accept from one socket: replaced when they die, drained and ended together.

    Each has a link of its own to the engine, and keeps its limits by itself. End them with `close`.
    """

    def __init__(self, config: Config, engine: EngineProcess, listener: socket.socket, started: float) -> None:
        self._config = config
        self._engine = engine
        self._listener = listener
        self._started = started
        self._counts, self._beats = engine.folder / "counts", engine.folder / "beats"
        self._counts.mkdir()
        self._beats.mkdir()
        self._links = itertools.count(1)
        self._processes: dict[int, Process] = {}
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS + 1)
        self._order = b""  # what they were told last
        loop, rows = asyncio.get_running_loop(), range(config.api_workers)
        self._failed: asyncio.Future[None] = loop.create_future()
        self._serving: list[asyncio.Future[ipc.Serving]] = [loop.create_future() for _ in rows]
        self._keeping = [asyncio.create_task(self._keep(row)) for row in rows]

    async def serve(self, shutdown: Shutdown, on_listening: Callable[[ipc.Serving], None]) -> None:
        """Serve an engine that is ready until `shutdown` or its end. Raises ModelError or ApiProcessError."""
        ended, stop = self._engine.ended, shutdown.stop
        await wait_first(asyncio.wait(self._serving, return_when=asyncio.FIRST_EXCEPTION), stop.wait(), ended)
        if stop.is_set() or ended.done():
            return
        serving = [outcome.result() for outcome in self._serving if outcome.done()]
        on_listening(serving[0])
        await wait_first(stop.wait(), ended, self._failed)
        all_over = asyncio.create_task(asyncio.wait(self._keeping))
        if stop.is_set() and not ended.done():
            self._tell(b"stop\n")
            await wait_first(all_over, shutdown.force.wait(), ended, timeout=self._config.drain_timeout + LAST_SECONDS)
        self._tell(b"engine ended\n" if ended.done() else b"force\n")
        await wait_first(all_over, timeout=LAST_SECONDS)
        if self._failed.done():
            self._failed.result()

    async def close(self) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        outcomes: list[asyncio.Future[Any]] = [*self._serving, self._failed]
        for outcome in outcomes:
            if outcome.done():
                outcome.exception()  # retrieved, or asyncio warns

    def _tell(self, order: bytes) -> None:
        self._order = order
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.write(order)

    async def _keep(self, row: int) -> None:
        """Have one process, at every time."""
        serving = self._serving[row]
        while True:
            try:
                end = f"ended with {describe_status(await self._run(row))}"
            except OSError as error:
                end = f"cannot be started: {error}"
            if self._order:
                return
            if not serving.done():
                serving.set_exception(ModelError(f"API process {row} {end} before it could serve"))
            if serving.exception() is not None:
                return
            self._deaths.append(time.monotonic())
            if len(self._deaths) > MOST_DEATHS and self._deaths[-1] - self._deaths[0] < DEATHS_SECONDS:
                if not self._failed.done():
                    text = f"API process {row} {end}, the last of too many in {DEATHS_SECONDS:.0f} s"
                    self._failed.set_exception(ApiProcessError(text))
                return
            logger.error("API process %d %s; its requests are ended, and another one is started", row, end)

    async def _run(self, row: int) -> int:
        """One life of a process; its exit status. Nothing of it is left in the engine."""
        engine, link = self._engine, next(self._links)
        # A session of its own, so that Ctrl-C in the terminal reaches the launcher alone.
        process = await asyncio.create_subprocess_exec(
            *WORKER_COMMAND,
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,
            pass_fds=[self._listener.fileno()],
            env=environment_with(PROMETHEUS_MULTIPROC_DIR=str(self._counts)),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._processes[row] = process
        setup = ipc.WorkerSetup(self._config, row, link, str(engine.folder), self._listener.fileno(), self._started)
        process.stdin.write(msgspec.json.encode(setup) + b"\n" + self._order)
        try:
            await engine.client.ready()
            engine.client.send(ipc.Attach(link, *ipc.addresses(engine.folder, link)))
            line = await process.stdout.readline()
            if line and not self._serving[row].done():
                said: ipc.Serving | ipc.Unable = msgspec.json.decode(line, type=ipc.Serving | ipc.Unable)
                if isinstance(said, ipc.Serving):
                    self._serving[row].set_result(said)
                else:
                    self._serving[row].set_exception(ModelError(said.error))
            await process.wait()
        finally:
            del self._processes[row]
            status = await asyncio.shield(asyncio.create_task(end_process(process)))
            engine.client.send(ipc.Detach(link))
            mark_process_dead(process.pid, str(self._counts))  # type: ignore[no-untyped-call]
            (self._beats / str(process.pid)).unlink(missing_ok=True)
        return status


async def report_status(client: EngineClient, every: float = STATUS_SECONDS) -> None:
    """Log a line every so often (s) while there is work, until cancelled or the engine is gone."""
    before, since = client.stats, time.monotonic()
    while client.dead is None:
        await asyncio.sleep(every)
        try:
            stats = await client.ping(every)
        except EngineDeadError as error:
            count = client.num_live or before.running + before.waiting
            if client.dead is None and count:
                status_logger.warning("%s; %d requests wait", error.message, count)
            continue
        now = time.monotonic()
        if stats.steps != before.steps or stats.waiting:
            status_logger.info("%s", describe_load(before, stats, now - since))
        before, since = stats, now


def describe_load(before: EngineStats, now: EngineStats, seconds: float) -> str:
    prompt = now.prompt_tokens - before.prompt_tokens
    cached = now.cached_prompt_tokens - before.cached_prompt_tokens
    owned = share(now.pages_total - now.pages_free - now.pages_cached, now.pages_total)
    return (
        f"running {now.running}, waiting {now.waiting}, KV owned {owned:.0%}, cached "
        f"{share(now.pages_cached, now.pages_total):.0%}, prompt {prompt / seconds:.1f} tok/s, "
        f"generated {(now.generated_tokens - before.generated_tokens) / seconds:.1f} tok/s, "
        f"prefix hits {share(cached, prompt):.0%}, retracted {now.retracted - before.retracted}"
    )


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


def check_public(config: Config, listener: socket.socket) -> None:
    """Raise ConfigError for an address that other machines reach where no key is asked for."""
    host = str(listener.getsockname()[0]).partition("%")[0]
    if not (config.api_key or config.allow_public or ipaddress.ip_address(host).is_loopback):
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, and no key is asked for: "
            "set --api-key or MINISGL_API_KEY, or give --allow-public"
        )


def check_certificate(config: Config) -> None:
    """Raise ConfigError for TLS files that cannot be used, before anything is loaded."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: "")
    except (OSError, ssl.SSLError) as error:
        files = f"--ssl-certfile {config.ssl_certfile} --ssl-keyfile {config.ssl_keyfile}"
        raise ConfigError(f"{files}: {error.strerror or error}") from error


def address(listener: socket.socket, config: Config) -> str:
    """The URL to reach a bound socket from this machine."""
    scheme = "http" if config.ssl_certfile is None else "https"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextlib.contextmanager
def handle_signals() -> Iterator[Shutdown]:
    """The first SIGINT or SIGTERM sets `stop`, the second `force`."""
    shutdown, loop = Shutdown(), asyncio.get_running_loop()

    def on_signal() -> None:
        if shutdown.stop.is_set():
            shutdown.force.set()
        else:
            shutdown.stop.set()
            print_status("stopping; once more to stop at once")

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield shutdown
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def announce(config: Config, url: str, ready: ipc.Ready, serving: ipc.Serving, started: float) -> None:
    """The ready line, the effective configuration and a request to paste; `started` is on the monotonic clock."""
    if not serving.has_tokenizer:
        print_status(f"{ready.folder} has no tokenizer: text is bytes, and any other token reads as its number")
    question = "What is the capital of France?"
    path, body = (
        ("chat/completions", {"messages": [{"role": "user", "content": question}]})
        if serving.chats
        else ("completions", {"prompt": "The capital of France is"})
    )
    seconds = time.monotonic() - started
    print(f"\nMini-SGLang {__version__} is ready after {seconds:.1f} s: {serving.model} on {url}/v1\n")
    for note in ready.notes:
        print(f"  {note}")
    headers = "-H 'Content-Type: application/json'"
    if config.api_key:
        print(f"  api_key = {len(config.api_key)} set: clients send one as 'Authorization: Bearer KEY'")
        headers += ' -H "Authorization: Bearer $MINISGL_API_KEY"'
    if serving.chats:
        print(f"\nchat in a browser: {url}/")
    print(f"\ncurl {url}/v1/{path} {headers} \\\n  -d '{json.dumps(body)}'\n", flush=True)


def print_status(line: str) -> None:
    """A line to stderr: stdout is for what the user asked for. A closed terminal is no error."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
