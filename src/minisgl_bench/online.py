"""One `minisgl bench online` from the first probe of the server to the report."""

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
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final, NamedTuple

import torch

from minisgl.errors import ConfigError, EngineDeadError
from minisgl.formats.hub import progress_bar
from minisgl_bench import metrics, traffic, usage
from minisgl_bench.client import PATHS, LoadClient, Target, parse_target
from minisgl_bench.command import load_kind
from minisgl_bench.metrics import RequestRecord
from minisgl_bench.report import RESULTS, Report, default_path, draw_latencies, slug
from minisgl_bench.traffic import IdPrompts, Segment, Session, TextPrompts

WARM_SEED, WARM_TOKENS, PROBE_TOKENS = -1, 16, 8
POLL_SECONDS, STOP_SECONDS = 0.1, 15.0
TAIL: Final = 2000  # bytes of a server's log in an error


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    on_gpu = torch.cuda.is_available()
    report = Report("online", arguments, options.json or (RESULTS / "online.json" if on_gpu else None), width=130)
    if options.trace is not None:
        traffic.read_trace(
            options.trace, options.requests or traffic.TRACE_REQUESTS
        )  # errors are told before a server starts
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
        report.finish(lambda path: draw_latencies(path, f"{slug(model)} online", runs, samples))
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
        report.print(metrics.latency_table(f"{client.model}, {label}", found))
        for line in (*metrics.lines(found), *usage.lines(found)):
            report.print(line)
    return samples


async def measure_one(
    client: LoadClient, found: dict[str, Any], seed: int, sessions: Sequence[Session], concurrency: int | None
) -> list[RequestRecord]:
    options = client.options
    hits = traffic.expected_hits((turn.segments for turn in traffic.all_turns(sessions)), options.cache_page)
    planned = client.prepare(sessions, seed, hits)
    records = [record for _, turns in planned for record in turns]
    pid = options.server_pid or usage.listener_pid(client.target)
    gc.collect()
    gc.freeze()
    with progress_bar(found["label"], len(records), enabled=True) as done:
        before = usage.process_tree(pid)
        async with usage.watch_client() as client_usage:
            if concurrency is not None:
                await client.closed_loop(planned, seed, concurrency, done)
            else:
                await client.open_loop(planned, seed, done)
        after = usage.process_tree(pid)
    gc.unfreeze()
    found |= metrics.figures(records, options.slo)
    found["client"] = usage.client_figures(client_usage, records, found["output_tokens"])
    if after:
        found["server_cpu"] = usage.cores_used(before, after, client_usage.seconds)
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
            reason = "the server does not say how many tokens a prompt has (usage.prompt_tokens)"
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
    """Start `minisgl` on a free port, wait until it answers, and end it. Raises EngineDeadError when it ends itself."""
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
