"""From request records to figures, and figures in the terminal: latencies, rates, goodput."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from minisgl_bench.report import GPU_HOURS, LATENCIES, QUANTILES, table


@dataclass(slots=True)
class RequestRecord:
    """What became of one request. Times are in s on the performance counter; counts are the server's own."""

    index: int
    due: float = 0.0
    sent: float = np.nan  # NaN: it never was
    times: "array[float]" = field(default_factory=lambda: array("d"))  # of each event with tokens
    expected_input: int | None = None
    expected_output: int = 0
    expected_cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None  # None: it did not say
    text: str = ""
    body: bytes | None = None  # of the request, where it needs no answer to an earlier turn
    failure: str | None = None  # a short kind that many requests may share
    detail: str = ""
    thinned: bool = False  # `times` are the first and the last of an event for each token


def times_of(record: RequestRecord) -> dict[str, float | None]:
    """Of a request, in s, from sending; `tpot` is the time per token after the first, None for a single token."""
    first, last = record.times[0], record.times[-1]
    tpot = (last - first) / (record.completion_tokens - 1) if record.completion_tokens > 1 else None
    return {"ttft": first - record.sent, "tpot": tpot, "e2e": last - record.sent}


def latencies(records: Sequence[RequestRecord]) -> dict[str, np.ndarray]:
    found = {"itl": np.concatenate([np.empty(0), *(np.diff(np.frombuffer(r.times)) for r in records if not r.thinned)])}
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
    start = min((record.sent for record in records if not np.isnan(record.sent)), default=0.0)
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
        "tokens_per_event": tokens_out / max(1, sum(r.completion_tokens if r.thinned else len(r.times) for r in good)),
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
    return rows


def summary_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    heads = ("requests/s", "output tokens/s", "TTFT", "TPOT", "end to end", "failed", "goodput", "cached / expected")
    simulated = ("GPU h / M output",) if any(GPU_HOURS in run for run in runs) else ()
    rows = []
    for run in runs:
        row = [run["label"], f"{run['requests_per_second']:,.2f}", f"{run['output_tokens_per_second']:,.0f}"]
        for values in (run["latency_ms"][name] for name in ("ttft", "tpot", "e2e")):
            row.append(" / ".join(f"{values[q]:,.0f}" for q in QUANTILES) if values else "–")
        row += [str(sum(run["failed"].values()))]
        row += [f"{run['goodput_requests_per_second']:,.2f}" if "within_slo" in run else "–"]
        row += [f"{percent(run['reported_hit_rate'])} / {percent(run['expected_hit_rate'])}"]
        rows.append([*row, f"{run[GPU_HOURS]:.3f}"] if GPU_HOURS in run else row)
    return table("p50 / p90 / p99 in ms", ("run", *heads, *simulated), rows)
