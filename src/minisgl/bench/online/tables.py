"""A run's figures in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from minisgl.bench.online.metrics import LATENCIES

NAMES: Final = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between two events",
    "e2e": "end to end",
}
BOUND: Final = 0.9
"""Share of a core from which a thread counts as busy all the time."""


def latency_table(title: str, found: Mapping[str, Any]) -> Table:
    """Latencies of a run, a row each."""
    table = Table(title=title)
    table.add_column("ms")
    columns = ("mean", "p50", "p90", "p99", "max")
    for name in columns:
        table.add_column(name, justify="right")
    for name in LATENCIES:
        values = found["latency_ms"][name]
        table.add_row(NAMES[name], *(f"{values[column]:,.1f}" if values else "–" for column in columns))
    return table


def percent(share: float | None) -> str:
    """A share, or that it is not known."""
    return "not reported" if share is None else f"{share:.1%}"


def lines(found: Mapping[str, Any]) -> list[str]:
    """The rest of a run's figures, in words."""
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
    return [*rows, client_line(found["client"]), *server_lines(found.get("server_cpu", ()))]


def client_line(client: Mapping[str, Any]) -> str:
    """What the client took, and whether it was the bottleneck."""
    lag, late = client["event_loop_lag_ms"], client["send_lateness_ms"]
    parts = [f"{client['cpu_share']:.2f} of a core ({client['cpu_us_per_output_token']:.0f} µs an output token)"]
    parts += [f"{name} p99 {values['p99']:.1f} ms" for name, values in (("lag", lag), ("sent late", late)) if values]
    verdict = "; ".join(client["bottleneck"])
    head = f"the client was a bottleneck ({verdict})" if verdict else "the client was not the bottleneck"
    return f"{head}: {', '.join(parts)}"


def server_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each of the server's processes took."""
    said = []
    for row in rows:
        busy = row["busiest_thread"] >= BOUND
        note = ", busy all the time" if busy else ""
        text = f"server process {row['pid']} ({row['name']}): {row['cores']:.2f} cores"
        said.append(f"{text}, its busiest thread takes {row['busiest_thread']:.2f}{note}")
    return said


def summary_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """All runs, a row each."""
    table = Table(title="p50 / p90 / p99 in ms")
    table.add_column("run")
    heads = ("requests/s", "output tokens/s", "TTFT", "TPOT", "end to end", "failed", "goodput", "cached / expected")
    for name in heads:
        table.add_column(name, justify="right")
    for run in runs:
        spans = []
        for name in ("ttft", "tpot", "e2e"):
            values = run["latency_ms"][name]
            spans.append(" / ".join(f"{values[q]:,.0f}" for q in ("p50", "p90", "p99")) if values else "–")
        table.add_row(
            run["label"],
            f"{run['requests_per_second']:,.2f}",
            f"{run['output_tokens_per_second']:,.0f}",
            *spans,
            str(sum(run["failed"].values())),
            f"{run['goodput_requests_per_second']:,.2f}" if "within_slo" in run else "–",
            f"{percent(run['reported_hit_rate'])} / {percent(run['expected_hit_rate'])}",
        )
    return table
