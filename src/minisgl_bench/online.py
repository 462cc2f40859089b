"""One `minisgl bench online` from the first probe of the server to the report."""

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final, NamedTuple, NoReturn

import torch
from rich.console import Console

from minisgl.errors import ConfigError, EngineDeadError
from minisgl.formats.hub import progress_bar
from minisgl_bench.client import AnswerError, RequestRecord, Target, error_text, fetch, parse_target
from minisgl_bench.command import load_kind
from minisgl_bench.cpu_usage import cores_used, listener_pid, process_tree, watch_client
from minisgl_bench.load_generator import PATHS, LoadClient, closed_loop, open_loop, prepare
from minisgl_bench.metrics import client_figures, figures, latencies, latency_table, lines, summary_table, times_of
from minisgl_bench.plots import draw_latencies
from minisgl_bench.report import RESULTS, console, default_path, require_writable, slug, write_report
from minisgl_bench.traces import read_trace
from minisgl_bench.traffic import (
    IdPrompts,
    Segment,
    Session,
    TextPrompts,
    Turn,
    all_turns,
    calibrate,
    expected_hits,
    from_chats,
    from_trace,
    from_workload,
    require_fit,
    single,
    with_arrivals,
)
from minisgl_bench.workload import CPU_SPEC, WorkloadSpec

NAME: Final = "online"
WIDTH: Final = 130
TRACE_REQUESTS: Final = 1000
WARM_SEED: Final = -1
WARM_TOKENS: Final = 16
PROBE_TOKENS: Final = 8
POLL_SECONDS: Final = 0.1
STOP_SECONDS: Final = 15.0
TAIL: Final = 2000


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure all loads with all seeds, print, and write the report; 1 when a request failed."""
    on_gpu = torch.cuda.is_available()
    require_writable(options.json or (RESULTS / f"{NAME}.json" if on_gpu else None))
    require_writable(options.samples, "--samples")
    if options.trace is not None:
        read_trace(options.trace, options.requests or TRACE_REQUESTS)  # what is wrong is said before a server starts
    options.small = options.serve is not None and not on_gpu
    options.salt = secrets.randbits(32) if options.salt is None else options.salt
    out = console(WIDTH)
    report: dict[str, Any] = {"model": None, "salt": options.salt, "runs": []}
    with contextlib.ExitStack() as stack:
        if options.serve is not None:
            out.print(f"starting minisgl {' '.join(options.serve)} …")
            served = stack.enter_context(own_server(options.serve, options.api_key))
            out.print(f"it answers after {served.start_seconds:.1f} s")
            options.url, options.server_pid = served.url, served.pid
            report["start_to_ready_seconds"] = served.start_seconds
        samples = asyncio.run(measure(options, report, out))
        # Before the server is ended: where it has ended by itself that is an error.
        if len(report["runs"]) > 1:
            out.print(summary_table(report["runs"]))
        source = options.trace.stem if options.trace else "chats" if options.chats else "lengths"
        name = f"{NAME}-{slug(source)}-{load_kind(options)}"
        path = options.json or (default_path(report["model"], name) if on_gpu else None)
        if path is not None:
            write_report(path, NAME, arguments, report)
            picture = path.with_suffix(".png")
            drawn = draw_latencies(picture, f"{slug(report['model'])} online", report["runs"], samples)
            out.print(f"written to {path}" + (f" and {picture}" if drawn else "; a picture needs minisgl[plot]"))
    return 1 if any(found["failed"] for found in report["runs"]) else 0


async def measure(options: argparse.Namespace, report: dict[str, Any], out: Console) -> list[dict[str, Any]]:
    """All runs, put into the report; returns their latencies. Raises ConfigError when the server cannot be used."""
    client, limit = await make_client(options)
    report["model"] = client.model
    samples = []
    kind = load_kind(options)
    for number, (value, seed) in enumerate(itertools.product(getattr(options, kind), options.seeds)):
        sessions = make_sessions(options, kind, value, seed)
        require_fit(sessions, limit)
        if not number:
            await warm_up(client, sessions, options.warmup)
        label = f"{kind} {value:g}" + (f", seed {seed}" if len(options.seeds) > 1 else "")
        found: dict[str, Any] = {"label": label, kind: value, "seed": seed}
        # No run's tokens are another's, so that none finds its prompts cached.
        mixed = hash((options.salt, seed, number))
        concurrency = int(value) if kind == "concurrency" else None
        records = await measure_one(client, options, found, mixed, sessions, concurrency)
        report["runs"].append(found)
        samples.append(latencies([record for record in records if record.failure is None]))
        out.print(latency_table(f"{client.model}, {label}", found))
        for line in lines(found):
            out.print(line)
        if options.samples is not None:
            write_samples(options.samples, label, records, append=number > 0)
    return samples


async def measure_one(
    client: LoadClient,
    options: argparse.Namespace,
    found: dict[str, Any],
    seed: int,
    sessions: Sequence[Session],
    concurrency: int | None,
) -> list[RequestRecord]:
    """One run, whose figures are added to `found`."""
    hits = expected_hits((turn.segments for turn in all_turns(sessions)), options.cache_page)
    planned = prepare(client, sessions, seed, hits)
    records = [record for item in planned for record in item.records]
    pid = options.server_pid or listener_pid(client.target)
    gc.collect()
    gc.freeze()
    with progress_bar(found["label"], len(records), enabled=True) as done:
        before = process_tree(pid) if pid is not None else {}
        async with watch_client() as usage:
            if concurrency is not None:
                await closed_loop(client, planned, seed, concurrency, done)
            else:
                await open_loop(client, planned, seed, done)
        after = process_tree(pid) if pid is not None else {}
    gc.unfreeze()
    found |= figures(records, options.slo)
    found["client"] = client_figures(usage, records, found["output_tokens"])
    if after:
        found["server_cpu"] = cores_used(before, after, usage.seconds)
    return records


def write_samples(path: Path, label: str, records: Sequence[RequestRecord], append: bool) -> None:
    start = min((record.sent for record in records if record.sent), default=0.0)
    with path.open("a" if append else "w") as file:
        for record in records:
            row: dict[str, Any] = {"run": label, "index": record.index, "failure": record.failure}
            if record.failure is None:
                row |= {
                    "due": record.due - start,
                    "sent": record.sent - start,
                    "prompt_tokens": record.prompt_tokens,
                    "completion_tokens": record.completion_tokens,
                    "cached_tokens": record.cached_tokens,
                    "expected_cached_tokens": record.expected_cached,
                    **times_of(record),
                }
            else:
                row["detail"] = record.detail
            file.write(json.dumps(row) + "\n")


def make_sessions(options: argparse.Namespace, kind: str, value: float, seed: int) -> list[Session]:
    default = CPU_SPEC if options.small else WorkloadSpec()
    inputs, outputs = options.input_len or default.input_len, options.output_len or default.output_len
    if options.trace is not None:
        trace = read_trace(options.trace, options.requests or TRACE_REQUESTS)
        scale = value if kind == "scale" else 1.0
        sessions = from_trace(trace, scale, options.max_input_len, options.max_output_len)
    elif options.chats is not None:
        shape = (options.chats, options.turns, options.system_prompts, options.system_len)
        sessions = from_chats(seed, *shape, inputs, outputs, options.think)
    else:
        count = options.requests or default.num_requests
        sessions = from_workload(WorkloadSpec(num_requests=count, input_len=inputs, output_len=outputs, seed=seed))
    return with_arrivals(sessions, value, options.burstiness, seed) if kind == "rate" else sessions


async def call(target: Target, method: str, path: str, body: object = None) -> Any:
    """The JSON of an answer. Raises ConfigError with what the server says when it is none."""
    data = b"" if body is None else json.dumps(body).encode()
    try:
        status, raw = await fetch(target, method, path, data)
    except (OSError, AnswerError) as error:
        where = f"{target.host}:{target.port}{target.prefix}{path}"
        raise ConfigError(f"no answer from {where}: {error or type(error).__name__}") from error
    if status != 200:
        raise ConfigError(f"the server refuses {method} {path} with {status}: {error_text(raw)}")
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"what {path} says is not JSON: {error}") from error


async def make_client(options: argparse.Namespace) -> tuple[LoadClient, int | None]:
    """How to ask this server, and the longest sequence it takes in tokens, where it says so."""
    target = parse_target(options.url, options.api_key)
    listed = await call(target, "GET", "/v1/models")
    found = listed.get("data") or [] if isinstance(listed, dict) else []
    models = {str(item["id"]): item for item in found if isinstance(item, dict) and "id" in item}
    name = options.model or next(iter(models), None)
    if name is None or name not in models:
        names = ", ".join(models) or "none"
        raise ConfigError(f"--model {name}: the server lists {names}" if name else "no model is served")
    client = LoadClient(target, name, await make_prompts(target, name, options), options)
    limit = models[name].get("max_model_len")
    return client, limit if isinstance(limit, int) else None


async def make_prompts(target: Target, model: str, options: argparse.Namespace) -> IdPrompts | TextPrompts:
    """Token ids, or words that were found to be one token each."""
    if options.endpoint == "ids":
        return IdPrompts(*options.tokens)
    chat = options.endpoint == "chat"

    async def count(text: str) -> int:
        asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        said = await call(target, "POST", PATHS[options.endpoint], {"model": model, "max_tokens": 1, **asked})
        try:
            return int(said["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "the server does not say how many tokens a prompt has (usage.prompt_tokens); use --endpoint ids"
            ) from error

    words, overhead = await calibrate(count)
    return TextPrompts(words, overhead, chat)


async def warm_up(client: LoadClient, sessions: Sequence[Session], count: int) -> None:
    """One small request alone, then the first `count` with other tokens and short answers, all at once.

    Raises ConfigError with what the server says when the first fails: then all would.
    """
    probe = single([Segment(("probe", 0), PROBE_TOKENS)], 1)
    first = prepare(client, [Session((probe,))], WARM_SEED, [0])
    await closed_loop(client, first, WARM_SEED, 1, lambda done: None)
    record = first[0].records[0]
    if record.failure is not None:
        raise ConfigError(f"the server does not answer a first request: {record.failure}: {record.detail}")
    turns = [
        turn
        for turn in all_turns(sessions)
        if not client.keep_text or all(message.role != "assistant" for message in turn.messages)
    ][:count]
    short = [Session((Turn(turn.messages, min(turn.output_length, WARM_TOKENS)),)) for turn in turns]
    planned = prepare(client, short, WARM_SEED, [0] * len(short))
    await closed_loop(client, planned, WARM_SEED, max(1, len(planned)), lambda done: None)


class OwnServer(NamedTuple):
    url: str
    pid: int
    start_seconds: float


@contextlib.contextmanager
def own_server(flags: Sequence[str], key: str | None) -> Iterator[OwnServer]:
    """Start `minisgl` with these flags on a free port, wait until it answers, and end it afterwards.

    Raises EngineDeadError with the end of what it said, when it ends before that.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "minisgl", *flags, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, **({"MINISGL_API_KEY": key} if key else {})}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log, ended_by_sigterm():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while not answers(port):
                require_running(process, log)
                time.sleep(POLL_SECONDS)
            yield OwnServer(f"http://127.0.0.1:{port}", process.pid, time.perf_counter() - started)
            require_running(process, log)
        finally:
            process.terminate()  # as a user would
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """While inside, SIGTERM unwinds the stack as Ctrl-C does, so that the server does not outlive the benchmark."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def answers(port: int) -> bool:
    """Whether the server says that it is well."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5.0)
    with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def require_running(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    if process.poll() is not None:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        said = log.read().decode(errors="replace").strip()
        raise EngineDeadError(f"the server ended with status {process.returncode}: {said}")
