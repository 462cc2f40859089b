"""From request records to figures, and figures in the terminal: latencies, rates, goodput, CPU use of both sides."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import psutil
from rich.table import Table

from minisgl_bench.client import RequestRecord, Target
from minisgl_bench.report import LATENCIES, QUANTILES, table

BUSY: Final = 0.8  # share of a core from which the client is the bottleneck: Python runs one thread at a time
LATE: Final = 0.010  # lag or lateness at p99, in s, from which the client's timing spoils the figures
BOUND: Final = 0.9  # share of a core from which a thread counts as busy all the time
TICK: Final = 0.01


def times_of(record: RequestRecord) -> dict[str, float | None]:
    """Of a request, in s, from sending; `tpot` is the time per token after the first, None for a single token."""
    first, last = record.times[0], record.times[-1]
    tpot = (last - first) / (record.completion_tokens - 1) if record.completion_tokens > 1 else None
    return {"ttft": first - record.sent, "tpot": tpot, "e2e": last - record.sent}


def latencies(records: Sequence[RequestRecord]) -> dict[str, np.ndarray]:
    found = {"itl": np.concatenate([np.empty(0), *(np.diff(np.frombuffer(record.times)) for record in records)])}
    times = [times_of(record) for record in records]
    for name in ("ttft", "tpot", "e2e"):
        found[name] = np.array([value for each in times if (value := each[name]) is not None])
    return found


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, quantiles and maximum, times 1000: s in, ms out. Empty for no values."""
    if not len(values):
        return {}
    quantiles = np.percentile(values, [float(name[1:]) for name in QUANTILES])
    found = {"mean": values.mean(), **dict(zip(QUANTILES, quantiles, strict=True)), "max": values.max()}
    return {name: 1e3 * float(value) for name, value in found.items()}


def figures(records: Sequence[RequestRecord], slo: Mapping[str, float]) -> dict[str, Any]:
    """All that is reported of a run but CPU use. Goodput is that of Zhong et al., "DistServe", OSDI 2024."""
    good = [record for record in records if record.failure is None]
    failed = [record for record in records if record.failure is not None]
    start = min((record.sent for record in records if record.sent), default=0.0)
    seconds = max((record.times[-1] for record in good), default=start) - start
    tokens_in = sum(record.prompt_tokens for record in good)
    tokens_out = sum(record.completion_tokens for record in good)
    per_second = 1 / seconds if seconds > 0 else 0.0
    cached = [record.cached_tokens for record in good if record.cached_tokens is not None]
    reported = len(cached) == len(good) and bool(good)
    result: dict[str, Any] = {
        "requests": len(records),
        "failed": dict(Counter(record.failure for record in failed)),
        "failure_examples": {record.failure: record.detail for record in failed},
        "seconds": seconds,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "requests_per_second": len(good) * per_second,
        "output_tokens_per_second": tokens_out * per_second,
        "total_tokens_per_second": (tokens_in + tokens_out) * per_second,
        "tokens_per_event": tokens_out / max(1, sum(len(record.times) for record in good)),
        "wrong_input_length": sum(r.expected_input not in (None, r.prompt_tokens) for r in good),
        "wrong_output_length": sum(r.expected_output != r.completion_tokens for r in good),
        "expected_hit_rate": sum(record.expected_cached for record in good) / max(1, tokens_in),
        "reported_hit_rate": sum(cached) / max(1, tokens_in) if reported else None,
        "latency_ms": {name: spread(values) for name, values in latencies(good).items()},
    }
    if slo:
        # a request of a single token keeps any limit of tpot
        kept = sum(all((times_of(r)[name] or 0.0) <= limit for name, limit in slo.items()) for r in good)
        result["slo_ms"] = {name: 1e3 * limit for name, limit in slo.items()}
        result["within_slo"] = kept / max(1, len(records))
        result["goodput_requests_per_second"] = kept * per_second
    return result


@dataclass
class ClientUsage:
    """The client's own part: seconds it ran, CPU seconds it took, and by how much (s) its event loop woke too late."""

    seconds: float = 0.0
    cpu: float = 0.0
    lags: array[float] = field(default_factory=lambda: array("d"))


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
    late = np.array([max(0.0, record.sent - record.due) for record in records if record.sent])
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


def latency_table(title: str, found: Mapping[str, Any]) -> Table:
    columns = ("mean", *QUANTILES, "max")
    spreads = {text: found["latency_ms"][name] for name, text in LATENCIES.items()}
    cells = {text: [f"{values[c]:,.1f}" if values else "–" for c in columns] for text, values in spreads.items()}
    return table(title, ("ms", *columns), [(text, *row) for text, row in cells.items()])


def percent(share: float | None) -> str:
    return "not reported" if share is None else f"{share:.1%}"


def lines(found: Mapping[str, Any]) -> list[str]:
    failed = sum(found["failed"].values())
    rows = [
        f"{found['requests'] - failed} of {found['requests']} requests in {found['seconds']:.2f} s: "
        f"{found['requests_per_second']:,.2f} requests/s, {found['output_tokens_per_second']:,.1f} output and "
        f"{found['total_tokens_per_second']:,.1f} total tokens/s, {found['tokens_per_event']:.2f} tokens an event",
        f"prefix cache: {percent(found['expected_hit_rate'])} of the prompt tokens expected without limits, "
        f"{percent(found['reported_hit_rate'])} by the server",
    ]
    if "within_slo" in found:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in found["slo_ms"].items())
        goodput = found["goodput_requests_per_second"]
        rows.append(f"goodput at {limits}: {goodput:,.2f} requests/s, {found['within_slo']:.1%} of the requests")
    rows += [f"failed: {n} × {kind}: {found['failure_examples'][kind]}" for kind, n in found["failed"].items()]
    for side in ("input", "output"):
        if wrong := found[f"wrong_{side}_length"]:
            rows.append(f"lengths: {wrong} requests have another {side} length than asked for, by the server's count")
    return [*rows, client_line(found["client"]), *map(server_line, found.get("server_cpu", ()))]


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


def summary_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    heads = ("requests/s", "output tokens/s", "TTFT", "TPOT", "end to end", "failed", "goodput", "cached / expected")
    rows = []
    for run in runs:
        row = [run["label"], f"{run['requests_per_second']:,.2f}", f"{run['output_tokens_per_second']:,.0f}"]
        for values in (run["latency_ms"][name] for name in ("ttft", "tpot", "e2e")):
            row.append(" / ".join(f"{values[q]:,.0f}" for q in QUANTILES) if values else "–")
        row += [str(sum(run["failed"].values()))]
        row += [f"{run['goodput_requests_per_second']:,.2f}" if "within_slo" in run else "–"]
        rows.append([*row, f"{percent(run['reported_hit_rate'])} / {percent(run['expected_hit_rate'])}"])
    return table("p50 / p90 / p99 in ms", ("run", *heads), rows)
