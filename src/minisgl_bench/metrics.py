"""From request records to figures, and figures in the terminal: latencies, rates, goodput, the client's own part."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from rich.table import Table

from minisgl_bench.client import RequestRecord
from minisgl_bench.cpu_usage import ClientUsage
from minisgl_bench.plots import LATENCIES
from minisgl_bench.report import table

QUANTILES: Final = ("p50", "p90", "p99")
BUSY: Final = 0.8
"""Share of a core from which the client's CPU counts as the bottleneck: Python runs one thread at a time."""
LATE: Final = 0.010
"""Lag or lateness at p99, in s, from which the client's timing spoils the figures."""
BOUND: Final = 0.9
"""Share of a core from which a thread counts as busy all the time."""


def times_of(record: RequestRecord) -> dict[str, float | None]:
    """Of a request, in s: from sending to the first token and to the last, and the time per token after the first.

    The latter is None for a single token.
    """
    first, last = record.times[0], record.times[-1]
    tpot = (last - first) / (record.completion_tokens - 1) if record.completion_tokens > 1 else None
    return {"ttft": first - record.sent, "tpot": tpot, "e2e": last - record.sent}


def latencies(records: Sequence[RequestRecord]) -> dict[str, np.ndarray]:
    """In s: an entry a request, for `itl` one for each two events of a request that follow each other."""
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


def meets(record: RequestRecord, slo: Mapping[str, float]) -> bool:
    """Whether a request kept every limit, in s; one of a single token keeps any `tpot`."""
    times = times_of(record)
    return all((times[name] or 0.0) <= limit for name, limit in slo.items())


def figures(records: Sequence[RequestRecord], slo: Mapping[str, float]) -> dict[str, Any]:
    """All that is reported of a run but the client's part. Goodput is that of Zhong et al., "DistServe", OSDI 2024.

    Hit rates are shares of prompt tokens: those that a prefix cache without limits would hold, and those that the
    server says were cached.
    """
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
        kept = sum(meets(record, slo) for record in good)
        result |= {
            "slo_ms": {name: 1e3 * limit for name, limit in slo.items()},
            "within_slo": kept / max(1, len(records)),
            "goodput_requests_per_second": kept * per_second,
        }
    return result


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


def latency_table(title: str, found: Mapping[str, Any]) -> Table:
    columns = ("mean", *QUANTILES, "max")
    rows = []
    for name, text in LATENCIES.items():
        values = found["latency_ms"][name]
        rows.append((text, *(f"{values[column]:,.1f}" if values else "–" for column in columns)))
    return table(title, ("ms", *columns), rows)


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
        spans = [run["latency_ms"][name] for name in ("ttft", "tpot", "e2e")]
        rows.append(
            (
                run["label"],
                f"{run['requests_per_second']:,.2f}",
                f"{run['output_tokens_per_second']:,.0f}",
                *(" / ".join(f"{values[q]:,.0f}" for q in QUANTILES) if values else "–" for values in spans),
                str(sum(run["failed"].values())),
                f"{run['goodput_requests_per_second']:,.2f}" if "within_slo" in run else "–",
                f"{percent(run['reported_hit_rate'])} / {percent(run['expected_hit_rate'])}",
            )
        )
    return table("p50 / p90 / p99 in ms", ("run", *heads), rows)
