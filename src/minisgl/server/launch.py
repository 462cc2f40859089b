"""`serve`: the launcher of the engine process and, with `--api-workers`, of processes that speak HTTP in its place."""

import asyncio
import contextlib
import functools
import importlib
import ipaddress
import logging
import signal
import socket
import ssl
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from prometheus_client.multiprocess import mark_process_dead

from minisgl import __version__
from minisgl.config import BUNDLED_MODEL, Config, check, environment_with
from minisgl.core.types import EngineStats
from minisgl.errors import ConfigError, EngineDeadError, ModelError
from minisgl.server import ipc
from minisgl.server.engine_client import Shutdown, SocketEngineClient, wait_first
from minisgl.server.errors import ApiProcessError
from minisgl.server.metrics import share
from minisgl.system import PrivateFolder, flush_standard_streams, open_standard_streams, print_text

ENGINE_COMMAND = (sys.executable, "-m", "minisgl.server.engine_process")
WORKER_COMMAND = (sys.executable, "-m", "minisgl.server.api_process")
MOST_DEATHS, DEATHS_SECONDS = 5, 60.0  # with one death more of an API process in that time the server ends
LAST_WORDS_SECONDS = 0.3  # for the last messages of an engine that has ended
LAST_SECONDS = 2.0  # for API processes to end when nothing is answered any more but with an error
STOP_SECONDS = 2.0  # for a process to go by itself, and then after SIGTERM
LOADING_SECONDS = STATUS_SECONDS = 5.0

logger = logging.getLogger(__name__)
status_logger = logging.getLogger("minisgl.status")


def serve(config: Config, command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises ConfigError when the port is taken, ModelError for a model that
    cannot be served, EngineDeadError when the engine dies, ApiProcessError when API processes die again and again.
    """
    open_standard_streams()
    check(config)
    check_certificate(config)
    ipc.start_logging(config)
    try:
        asyncio.run(run(config, command))
    finally:
        flush_standard_streams()


async def run(config: Config, command: Sequence[str]) -> None:
    with listen_socket(config.host, config.port) as listener, PrivateFolder() as folder:
        check_public(config, listener)
        started, shutdown = time.monotonic(), handle_signals()
        stop = shutdown.stop
        print_text(f"loading {config.model or BUNDLED_MODEL} …")
        process = await start_process(command, ipc.EngineSetup(config.without_keys(), folder))
        client = SocketEngineClient(folder, config)
        ended = asyncio.create_task(watch_engine(process, client))
        loading, status = asyncio.create_task(client.ready()), asyncio.create_task(report_status(client))
        workers: ApiWorkers | None = None
        try:
            # What speaks HTTP gets ready while the engine loads.
            if config.api_workers == 1:
                await asyncio.to_thread(importlib.import_module, "minisgl.server.api_process")
            else:
                setup = ipc.WorkerSetup(config, folder, tempfile.mkdtemp(dir=folder), listener.fileno(), started)
                workers = ApiWorkers(setup, client.gone)
            while not loading.done() and not stop.is_set():
                await wait_first(loading, stop.wait(), timeout=LOADING_SECONDS)
                if not loading.done() and not stop.is_set():
                    print_text(f"still loading after {time.monotonic() - started:.0f} s …")
            if stop.is_set():
                return
            with contextlib.suppress(EngineDeadError):  # its exit status says more, below
                url, ready = address(listener, config), loading.result()
                on_listening = functools.partial(announce, config, url, started, ready)
                if workers is None:
                    from minisgl.server.api_process import serve_api

                    await serve_api(config, client, listener, shutdown, started, on_listening)
                else:
                    await workers.serve(shutdown, on_listening)
        finally:
            if workers is not None:
                await workers.close()
            loading.cancel()
            status.cancel()
            await asyncio.gather(loading, status, return_exceptions=True)
            await end_process(process)
            exit_status = await ended
            await client.close()
        if not stop.is_set():
            when = " before it was ready" if loading.exception() else ""
            raise EngineDeadError(f"the engine process ended with {describe_status(exit_status)}{when}")


async def watch_engine(process: Process, client: SocketEngineClient) -> int:
    status = await process.wait()
    await asyncio.sleep(LAST_WORDS_SECONDS)
    client.fail()
    return status


class ApiWorkers:
    """API processes that accept from one socket: replaced when they die, drained and ended together."""

    def __init__(self, setup: ipc.WorkerSetup, engine_gone: asyncio.Event) -> None:
        rows, loop = range(setup.config.api_workers), asyncio.get_running_loop()
        self._setup = setup
        self._engine_gone = engine_gone
        self._processes: dict[int, Process] = {}  # the last of each row
        self._serving: list[asyncio.Future[ipc.Serving]] = [loop.create_future() for _ in rows]
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS + 1)
        self._order = b""  # what they were told last
        self._keeping = [loop.create_task(self._keep(row)) for row in rows]

    async def serve(self, shutdown: Shutdown, on_listening: Callable[[ipc.Serving], None]) -> None:
        """Serve an engine that is ready until `shutdown` or its end. Raises ModelError or ApiProcessError."""
        gone, stop, all_serve = self._engine_gone, shutdown.stop, asyncio.gather(*self._serving)
        await wait_first(all_serve, gone.wait(), stop.wait(), *self._keeping)
        if stop.is_set() or gone.is_set():
            return
        if all_serve.done():
            on_listening(all_serve.result()[0])
            await wait_first(gone.wait(), stop.wait(), *self._keeping)
        all_over = asyncio.create_task(asyncio.wait(self._keeping))
        if stop.is_set() and not gone.is_set():
            self._tell(b"stop\n")
            timeout = self._setup.config.drain_timeout + LAST_SECONDS
            await wait_first(all_over, shutdown.force.wait(), gone.wait(), timeout=timeout)
        if not gone.is_set():
            self._tell(b"force\n")
        await wait_first(all_over, timeout=LAST_SECONDS)
        for task in self._keeping:
            if task.done():
                task.result()

    async def close(self) -> None:
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*map(end_process, self._processes.values()))

    def _tell(self, order: bytes) -> None:
        self._order = order
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.write(order)

    async def _keep(self, row: int) -> None:
        """Have a process serve until it is told to stop. Raises ModelError or ApiProcessError when it cannot."""
        while True:
            try:
                end = f"ended with {describe_status(await self._run(row))}"
            except OSError as error:
                end = f"cannot be started: {error}"
            if self._order or self._engine_gone.is_set():
                return
            if not self._serving[row].done():
                raise ModelError(f"API process {row} {end} before it could serve")
            self._deaths.append(time.monotonic())
            if len(self._deaths) > MOST_DEATHS and self._deaths[-1] - self._deaths[0] < DEATHS_SECONDS:
                raise ApiProcessError(f"API process {row} {end}, the last of too many in {DEATHS_SECONDS:.0f} s")
            logger.error("API process %d %s; its requests are ended, and another one is started", row, end)

    async def _run(self, row: int) -> int:
        """One life of a process; its exit status. Nothing of it is left in the engine."""
        setup = msgspec.structs.replace(self._setup, row=row)
        env = environment_with(PROMETHEUS_MULTIPROC_DIR=setup.counts)
        process = await start_process(WORKER_COMMAND, setup, stdout=PIPE, pass_fds=[setup.listener], env=env)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(self._order)
        self._processes[row] = process
        if line := await process.stdout.readline():
            serving = msgspec.json.decode(line, type=ipc.Serving)
            if not self._serving[row].done():
                if serving.error is not None:
                    raise ModelError(serving.error)
                self._serving[row].set_result(serving)
        status = await process.wait()
        mark_process_dead(process.pid, setup.counts)  # type: ignore[no-untyped-call]
        return status


async def start_process(command: Sequence[str], setup: ipc.EngineSetup, **options: Any) -> Process:
    """Start a process with its setup as a line on stdin, whose end tells it that the launcher is gone."""
    # A session of its own, so that Ctrl-C in the terminal reaches the launcher alone.
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, start_new_session=True, **options)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(setup) + b"\n")
    return process


async def end_process(process: Process) -> int:
    """End a process: its stdin is closed, then it is told, then made to; its exit status."""
    assert process.stdin is not None
    process.stdin.close()
    for end in (process.terminate, process.kill):
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(process.wait(), STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            end()
    return await process.wait()


def describe_status(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


async def report_status(client: SocketEngineClient, every: float = STATUS_SECONDS) -> None:
    """Log a line every so often (s) while there is work, until cancelled or the engine is gone."""
    await client.ready()
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
    """A socket that is bound, but does not listen before the model is loaded. Raises ConfigError."""
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
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: "")
    except (OSError, ssl.SSLError) as error:
        files = f"--ssl-certfile {config.ssl_certfile} --ssl-keyfile {config.ssl_keyfile}"
        raise ConfigError(f"{files}: {error.strerror or error}") from error


def address(listener: socket.socket, config: Config) -> str:
    scheme = "http" if config.ssl_certfile is None else "https"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def handle_signals() -> Shutdown:
    """The first SIGINT, SIGTERM or SIGHUP sets `stop`, the second `force`, for as long as the event loop lives."""
    shutdown, loop = Shutdown(), asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if not shutdown.stop.is_set():
            shutdown.stop.set()
            print_text("stopping; once more to stop at once")
        elif number != signal.SIGHUP:  # of a closed terminal there may be several: the shell's and the kernel's
            shutdown.force.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            loop.add_signal_handler(number, on_signal, number)
    return shutdown


def announce(config: Config, url: str, started: float, ready: ipc.Ready, serving: ipc.Serving) -> None:
    """The ready line, the effective configuration and a request to paste; `started` is on the monotonic clock."""
    if not serving.has_tokenizer:
        print_text(f"{ready.folder} has no tokenizer: text is bytes, and any other token reads as its number")
    seconds = time.monotonic() - started
    lines = [f"\nMini-SGLang {__version__} is ready after {seconds:.1f} s: {serving.model} on {url}/v1\n"]
    lines += [f"  {note}" for note in ready.notes]
    headers = "-H 'Content-Type: application/json'"
    if config.api_key:
        lines.append(f"  api_key = {len(config.api_key)} set: clients send one as 'Authorization: Bearer KEY'")
        headers += ' -H "Authorization: Bearer $MINISGL_API_KEY"'
    path, body = "completions", '{"prompt": "The capital of France is"}'
    if serving.chats:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
        lines.append(f"\nchat in a browser: {url}/")
    lines.append(f"\ncurl {url}/v1/{path} {headers} \\\n  -d '{body}'\n")
    print_text("\n".join(lines), to_stdout=True)
