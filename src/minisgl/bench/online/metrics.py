"""From records to figures: latencies, rates, goodput, and what the client's own part was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from minisgl.bench.online.client import Record
from minisgl.bench.online.watch import Client

LATENCIES: Final = ("ttft", "tpot", "itl", "e2e")
QUANTILES: Final = (50, 90, 99)
BUSY: Final = 0.8
"""Share of a core from which the client's CPU counts as the bottleneck: Python runs one thread at a time."""
LATE: Final = 0.010
"""Lag or lateness at p99, in s, from which the client's timing spoils the figures."""


def ttft(record: Record) -> float:
    """Time to first token, from sending, in s."""
    return record.times[0] - record.sent


def e2e(record: Record) -> float:
    """From sending to the last token, in s."""
    return record.times[-1] - record.sent


def tpot(record: Record) -> float | None:
    """Time per output token after the first, in s; None for a single token."""
    if record.completion_tokens < 2:
        return None
    return (record.times[-1] - record.times[0]) / (record.completion_tokens - 1)


def latencies(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """In s: an entry a request, for `itl` one for each two events of a request that follow each other."""
    gaps = [np.diff(np.frombuffer(record.times)) for record in records]
    return {
        "ttft": np.array([ttft(record) for record in records]),
        "tpot": np.array([value for record in records if (value := tpot(record)) is not None]),
        "itl": np.concatenate(gaps) if gaps else np.empty(0),
        "e2e": np.array([e2e(record) for record in records]),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, quantiles and maximum, times 1000: s in, ms out. Empty for no values."""
    if not len(values):
        return {}
    quantiles = {f"p{q}": float(np.percentile(values, q)) for q in QUANTILES}
    found = {"mean": float(values.mean()), **quantiles, "max": float(values.max())}
    return {name: 1e3 * value for name, value in found.items()}


def meets(record: Record, slo: Mapping[str, float]) -> bool:
    """Whether a request kept every limit, in s; one of a single token keeps any `tpot`."""
    found = {"ttft": ttft(record), "tpot": tpot(record) or 0.0, "e2e": e2e(record)}
    return all(found[name] <= limit for name, limit in slo.items())


def figures(records: Sequence[Record], slo: Mapping[str, float]) -> dict[str, Any]:
    """All that is reported of a run but the client's part. Goodput is that of Zhong et al., "DistServe", OSDI 2024."""
    good = [record for record in records if record.failure is None]
    failures = Counter(record.failure for record in records if record.failure is not None)
    details = {record.failure: record.detail for record in records if record.failure is not None}
    start = min((record.sent for record in records if record.sent), default=0.0)
    seconds = max((record.times[-1] for record in good), default=start) - start
    tokens_in = sum(record.prompt_tokens for record in good)
    tokens_out = sum(record.completion_tokens for record in good)
    per_second = 1 / seconds if seconds > 0 else 0.0
    result: dict[str, Any] = {
        "requests": len(records),
        "failed": dict(failures),
        "failure_examples": details,
        "seconds": seconds,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "requests_per_second": len(good) * per_second,
        "output_tokens_per_second": tokens_out * per_second,
        "total_tokens_per_second": (tokens_in + tokens_out) * per_second,
        "tokens_per_event": tokens_out / max(1, sum(len(record.times) for record in good)),
        "wrong_input_length": sum(r.expected_input not in (None, r.prompt_tokens) for r in good),
        "wrong_output_length": sum(r.expected_output != r.completion_tokens for r in good),
        **cache_figures(good),
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


def cache_figures(good: Sequence[Record]) -> dict[str, float | None]:
    """Shares of prompt tokens that a prefix cache without limits would hold, and that the server says were cached."""
    tokens = max(1, sum(record.prompt_tokens for record in good))
    reported = [record.cached_tokens for record in good if record.cached_tokens is not None]
    known = len(reported) == len(good) and bool(good)
    return {
        "expected_hit_rate": sum(record.expected_cached for record in good) / tokens,
        "reported_hit_rate": sum(reported) / tokens if known else None,
    }


def client_figures(client: Client, records: Sequence[Record], tokens: int) -> dict[str, Any]:
    """What the client took, and for which reasons, if any, it was the bottleneck itself."""
    late = np.array([max(0.0, record.sent - record.due) for record in records if record.sent])
    lags = np.frombuffer(client.lags)
    share = client.cpu / client.seconds if client.seconds else 0.0
    found = {"event loop lag": spread(lags), "send lateness": spread(late)}
    reasons = [
        f"{name} p99 {values['p99']:.1f} ms, above {1e3 * LATE:.0f} ms"
        for name, values in found.items()
        if values and values["p99"] > 1e3 * LATE
    ]
    if share > BUSY:
        reasons.append(f"CPU {share:.2f} of a core, above {BUSY}")
    return {
        "cpu_share": share,
        "cpu_us_per_output_token": 1e6 * client.cpu / max(1, tokens),
        "event_loop_lag_ms": found["event loop lag"],
        "send_lateness_ms": found["send lateness"],
        "bottleneck": reasons,
    }
