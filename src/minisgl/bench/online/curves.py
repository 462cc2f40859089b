"""Pictures of a benchmark: how latencies are distributed, and what more throughput costs in latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from minisgl.bench.online.metrics import LATENCIES
from minisgl.bench.online.tables import NAMES

LEAST: Final = 1e-3
"""Where an axis begins, in ms: events that come together are 0 apart, which a logarithm cannot show."""


def draw_curves(
    path: Path, title: str, runs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> bool:
    """Write the distributions of each run, and below them latency against throughput; False without matplotlib.

    `samples` holds for each run the latencies in s, by name.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(15, 8), layout="constrained")
    grid = figure.subplots(2, 4)
    for axes, name in zip(grid[0], LATENCIES, strict=True):
        for run, values in zip(runs, samples, strict=True):
            if len(values[name]):
                axes.plot(np.maximum(1e3 * np.sort(values[name]), LEAST), shares(len(values[name])), label=run["label"])
                axes.set_xscale("log")
        axes.set(xlabel=f"{NAMES[name]}, ms", ylabel="share of all", ylim=(0, 1))
        axes.grid(alpha=0.3)
    if grid[0][0].lines:
        grid[0][0].legend(fontsize="small")
    order = sorted(range(len(runs)), key=lambda i: float(runs[i]["output_tokens_per_second"]))
    for axes, name in zip(grid[1], LATENCIES, strict=True):
        drawn = [runs[i] for i in order if runs[i]["latency_ms"][name]]
        for quantile in ("p50", "p90", "p99") if drawn else ():
            rates = [run["output_tokens_per_second"] for run in drawn]
            axes.plot(
                rates, [max(LEAST, run["latency_ms"][name][quantile]) for run in drawn], marker="o", label=quantile
            )
            axes.set_yscale("log")
        axes.set(xlabel="output tokens/s", ylabel=f"{NAMES[name]}, ms")
        axes.grid(alpha=0.3)
    if grid[1][0].lines:
        grid[1][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return True


def shares(count: int) -> np.ndarray:
    """The distribution function at sorted values."""
    return np.arange(1, count + 1) / count
