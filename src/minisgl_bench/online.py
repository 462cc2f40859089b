"""One `minisgl bench online` from the first probe of the server to the report, and what the load test itself costs."""

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, NamedTuple

import numpy as np
import psutil
import torch

from minisgl.errors import ConfigError, EngineDeadError
from minisgl.formats.hub import progress_bar
from minisgl_bench import metrics, traffic
from minisgl_bench.client import PATHS, LoadClient, Target, parse_target
from minisgl_bench.command import load_kind
from minisgl_bench.metrics import RequestRecord, spread
from minisgl_bench.report import RESULTS, Report, default_path, draw_latencies, slug
from minisgl_bench.traffic import IdPrompts, Segment, Session, TextPrompts

WARM_SEED, WARM_TOKENS, PROBE_TOKENS = -1, 16, 8
POLL_SECONDS, STOP_SECONDS = 0.1, 15.0
TAIL: Final = 2000  # bytes of a server's log in an error
BUSY: Final = 0.8  # share of a core from which the client is the bottleneck: Python runs one thread at a time
LATE: Final = 0.010  # lag or lateness at p99, in s, from which the client's timing spoils the figures
BOUND: Final = 0.9  # share of a core from which a thread counts as busy all the time
TICK: Final = 0.01


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    on_gpu = torch.cuda.is_available()
    report = Report("online", arguments, options.json or (RESULTS / "online.json" if on_gpu else None), width=130)
    if options.trace is not None:
        # Errors are told before a server starts.
        traffic.read_trace(options.trace, options.requests or traffic.TRACE_REQUESTS)
    options.small = options.serve is not None and not on_gpu
    options.salt = secrets.randbits(32) if options.salt is None else options.salt
    report.figures |= {"model": None, "salt": options.salt, "runs": []}
    runs = report.figures["runs"]
    with contextlib.ExitStack() as stack:
        if options.serve is not None:
            report.print(f"starting minisgl {' '.join(options.serve)} …")
            served = stack.enter_context(own_server(options.serve, options.api_key))
            report.print(f"it answers after {served.start_seconds:.1f} s")
            options.url, options.server_pid = served.url, served.pid
            report.figures["start_to_ready_seconds"] = served.start_seconds
        client, limit = make_client(options)
        model = report.figures["model"] = client.model
        samples = asyncio.run(measure(client, limit, report))
        # Before the server is ended: where it has ended by itself that is an error.
        if len(runs) > 1:
            report.print(metrics.summary_table(runs))
        if report.path is not None and options.json is None:
            source = options.trace.stem if options.trace else "chats" if options.chats else "lengths"
            report.path = default_path(model, f"online-{slug(source)}-{load_kind(options)}")
        report.finish(lambda figure: draw_latencies(figure, f"{slug(model)} online", runs, samples))
    return 1 if any(found["failed"] for found in runs) else 0


async def measure(client: LoadClient, limit: int | None, report: Report) -> list[dict[str, Any]]:
    """All runs, put into the report; returns their latencies. `limit`: the longest sequence the server takes."""
    samples, options = [], client.options
    kind = load_kind(options)
    for number, (value, seed) in enumerate(itertools.product(getattr(options, kind), options.seeds)):
        sessions = traffic.make_sessions(options, kind, value, seed)
        traffic.require_fit(sessions, limit)
        if not number:
            await warm_up(client, sessions, options.warmup)
        label = f"{kind} {value:g}" + (f", seed {seed}" if len(options.seeds) > 1 else "")
        found: dict[str, Any] = {"label": label, kind: value, "seed": seed}
        # No run's tokens are another's, so that none finds its prompts cached.
        mixed = hash((options.salt, seed, number))
        records = await measure_one(client, found, mixed, sessions, value if kind == "concurrency" else None)
        report.figures["runs"].append(found)
        samples.append(metrics.latencies([record for record in records if record.failure is None]))
        report.print(metrics.latency_table(f"{client.model}, {label}", found), *metrics.lines(found))
        report.print(client_line(found["client"]), *map(server_line, found.get("server_cpu", ())))
    return samples


async def measure_one(
    client: LoadClient, found: dict[str, Any], seed: int, sessions: Sequence[Session], concurrency: int | None
) -> list[RequestRecord]:
    options = client.options
    hits = traffic.expected_hits((turn.segments for turn in traffic.all_turns(sessions)), options.cache_page)
    planned = client.prepare(sessions, seed, hits)
    records = [record for _, turns in planned for record in turns]
    pid = options.server_pid or listener_pid(client.target)
    gc.collect()
    gc.freeze()
    with progress_bar(found["label"], len(records), enabled=True) as done:
        before = process_tree(pid)
        async with watch_client() as client_usage:
            if concurrency is not None:
                await client.closed_loop(planned, seed, concurrency, done)
            else:
                await client.open_loop(planned, seed, done)
        after = process_tree(pid)
    gc.unfreeze()
    found |= metrics.figures(records, options.slo)
    found["client"] = client_figures(client_usage, records, found["output_tokens"])
    if after:
        found["server_cpu"] = cores_used(before, after, client_usage.seconds)
    return records


def make_client(options: argparse.Namespace) -> tuple[LoadClient, int | None]:
    """How to ask this server, and the longest sequence it takes in tokens, where it says so."""
    target = parse_target(options.url, options.api_key)
    listed = target.call("/v1/models")
    found = listed.get("data") or [] if isinstance(listed, dict) else []
    models = {str(item["id"]): item for item in found if isinstance(item, dict) and "id" in item}
    name = options.model or next(iter(models), None)
    if name is None or name not in models:
        names = ", ".join(models) or "none"
        raise ConfigError(f"--model {name}: the server lists {names}" if name else "no model is served")
    limit = models[name].get("max_model_len")
    client = LoadClient(target, name, make_prompts(target, name, options), options)
    return client, limit if isinstance(limit, int) else None


def make_prompts(target: Target, model: str, options: argparse.Namespace) -> IdPrompts | TextPrompts:
    if options.endpoint == "ids":
        return IdPrompts(*options.tokens)
    chat = options.endpoint == "chat"

    def count(text: str) -> int:
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        said = target.call(PATHS[options.endpoint], {"model": model, "max_tokens": 1, **asked})
        try:
            return int(said["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            reason = "the server does not say how many tokens a prompt has (prompt_tokens)"
            raise ConfigError(f"{reason}; use --endpoint ids") from error

    words, overhead = traffic.calibrate(count)
    return TextPrompts(words, overhead, chat)


async def warm_up(client: LoadClient, sessions: Sequence[Session], count: int) -> None:
    """One small request alone, which must not fail, then the first `count` with other tokens and short answers."""
    probe = Session((traffic.single([Segment(("probe", 0), PROBE_TOKENS)], 1),))
    planned = client.prepare([probe], WARM_SEED)
    await client.closed_loop(planned, WARM_SEED, 1, lambda done: None)
    record = planned[0][1][0]
    if record.failure is not None:
        raise ConfigError(f"the server does not answer a first request: {record.failure}: {record.detail}")
    turns = traffic.all_turns(sessions)
    if client.keep_text:  # turns that need no answer
        turns = [turn for turn in turns if all(message.role != "assistant" for message in turn.messages)]
    brief = [dataclasses.replace(turn, output_length=min(turn.output_length, WARM_TOKENS)) for turn in turns[:count]]
    short = [Session((turn,)) for turn in brief]
    await client.closed_loop(client.prepare(short, WARM_SEED), WARM_SEED, max(1, len(short)), lambda done: None)


class OwnServer(NamedTuple):
    url: str
    pid: int
    start_seconds: float


@contextlib.contextmanager
def own_server(flags: Sequence[str], key: str | None) -> Iterator[OwnServer]:
    """Start `minisgl` on a free port, wait until it answers, and end it. Raises EngineDeadError when it ends itself,
    ConfigError for TLS.
    """
    if any(flag.startswith("--ssl-") for flag in flags):
        raise ConfigError("--serve is measured without TLS: leave --ssl-certfile out, or start a server and give --url")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "minisgl", *flags, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **({"MINISGL_API_KEY": key} if key else {})}
    started = time.perf_counter()
    # SIGTERM unwinds the stack as Ctrl-C does, so that the server does not outlive the benchmark
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            target = parse_target(f"http://127.0.0.1:{port}", key)
            while True:
                with contextlib.suppress(ConfigError):
                    target.call("/health", timeout=5.0)
                    break
                require_running(process, log)
                time.sleep(POLL_SECONDS)
            yield OwnServer(target.url, process.pid, time.perf_counter() - started)
            require_running(process, log)
        finally:
            process.terminate()  # as a user would
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)


def require_running(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    if process.poll() is not None:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        said = log.read().decode(errors="replace").strip()
        raise EngineDeadError(f"the server ended with status {process.returncode}: {said}")


@dataclass
class ClientUsage:
    """The client's own part: seconds it ran, CPU seconds it took, and by how much (s) its event loop woke too late."""

    seconds: float = 0.0
    cpu: float = 0.0
    lags: "array[float]" = field(default_factory=lambda: array("d"))


@contextlib.asynccontextmanager
async def watch_client() -> AsyncIterator[ClientUsage]:
    usage, loop = ClientUsage(), asyncio.get_running_loop()

    async def measure() -> None:
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            usage.lags.append(max(0.0, loop.time() - due))

    watching = asyncio.create_task(measure())
    started, cpu = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        usage.seconds, usage.cpu = time.perf_counter() - started, time.process_time() - cpu
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def client_figures(usage: ClientUsage, records: Sequence[RequestRecord], tokens: int) -> dict[str, Any]:
    late = np.array([max(0.0, record.sent - record.due) for record in records if not np.isnan(record.sent)])
    found = {"event loop lag": spread(np.frombuffer(usage.lags)), "send lateness": spread(late)}
    share = usage.cpu / usage.seconds if usage.seconds else 0.0
    reasons = [
        f"{name} p99 {values['p99']:.1f} ms, above {1e3 * LATE:.0f} ms"
        for name, values in found.items()
        if values and values["p99"] > 1e3 * LATE
    ]
    if share > BUSY:
        reasons.append(f"CPU {share:.2f} of a core, above {BUSY}")
    return {
        "cpu_share": share,
        "cpu_us_per_output_token": 1e6 * usage.cpu / max(1, tokens),
        "event_loop_lag_ms": found["event loop lag"],
        "send_lateness_ms": found["send lateness"],
        "bottleneck": reasons,
    }


@dataclass(frozen=True)
class ProcessCpu:
    name: str
    seconds: float
    threads: dict[int, float]


ProcessTree = dict[int, ProcessCpu]  # by process id


def process_tree(root: int | None) -> ProcessTree:
    found: ProcessTree = {}
    with contextlib.suppress(psutil.Error):
        members = [] if root is None else [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        for member in members:
            with contextlib.suppress(psutil.Error), member.oneshot():
                times, words = member.cpu_times(), member.cmdline() or ["?"]
                name = words[words.index("-m") + 1] if "-m" in words[:-1] else os.path.basename(words[0])
                threads = {thread.id: thread.user_time + thread.system_time for thread in member.threads()}
                found[member.pid] = ProcessCpu(name, times.user + times.system, threads)
    return found


def cores_used(before: ProcessTree, after: ProcessTree, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for pid, now in after.items():
        then = before.get(pid, ProcessCpu(now.name, 0.0, {}))
        threads = [spent - then.threads.get(task, 0.0) for task, spent in now.threads.items()]
        cores, busiest = (now.seconds - then.seconds) / seconds, max(threads, default=0.0) / seconds
        rows.append({"pid": pid, "name": now.name, "cores": cores, "busiest_thread": busiest})
    return sorted(rows, key=lambda row: -row["cores"])


def listener_pid(target: Target) -> int | None:
    local = target.address.startswith("127.") or target.address == "::1"
    found = psutil.net_connections("tcp") if local else []
    return min((c.pid for c in found if c.pid and c.status == "LISTEN" and c.laddr.port == target.port), default=None)


def client_line(client: Mapping[str, Any]) -> str:
    parts = [f"{client['cpu_share']:.2f} of a core ({client['cpu_us_per_output_token']:.0f} µs an output token)"]
    for name, values in (("lag", client["event_loop_lag_ms"]), ("sent late", client["send_lateness_ms"])):
        if values:
            parts.append(f"{name} p99 {values['p99']:.1f} ms")
    verdict = "; ".join(client["bottleneck"])
    head = f"the client was a bottleneck ({verdict})" if verdict else "the client was not the bottleneck"
    return f"{head}: {', '.join(parts)}"


def server_line(row: Mapping[str, Any]) -> str:
    note = ", busy all the time" if row["busiest_thread"] >= BOUND else ""
    text = f"server process {row['pid']} ({row['name']}): {row['cores']:.2f} cores"
    return f"{text}, its busiest thread takes {row['busiest_thread']:.2f}{note}"
