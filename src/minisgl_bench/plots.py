"""Pictures of a benchmark's figures, where matplotlib is installed (`minisgl[plot]`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

LATENCIES: Final = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between two events",
    "e2e": "end to end",
}
LEAST: Final = 1e-3
"""Where an axis begins, in ms: events that come together are 0 apart, which a logarithm cannot show."""


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def draw_ablation(path: Path, title: str, bars: Sequence[tuple[str, str, float]]) -> bool:
    """Write a bar for each variant: its group, name, and rate relative to the default; False without matplotlib."""
    figure = new_figure(10, 1.2 + 0.24 * len(bars))
    if figure is None:
        return False
    groups = list(dict.fromkeys(group for group, _, _ in bars))
    axes = figure.add_subplot()
    colours = [f"C{groups.index(group)}" for group, _, _ in bars]
    drawn = axes.barh(distinct([name for _, name, _ in bars]), [share for _, _, share in bars], color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="output tokens/s, relative to the default on the same workload", title=title)
    figure.savefig(path, dpi=120)
    return True


def distinct(names: Sequence[str]) -> list[str]:
    """The names, a number behind those that came before: bars of one name would lie on each other."""
    return [name if name not in names[:i] else f"{name} {names[:i].count(name) + 1}" for i, name in enumerate(names)]


def draw_latencies(
    path: Path, title: str, runs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> bool:
    """Write the distributions of each run, and below them latency against throughput; False without matplotlib.

    `samples` holds for each run the latencies in s, by name.
    """
    figure = new_figure(15, 8)
    if figure is None:
        return False
    grid = figure.subplots(2, 4)
    for axes, name in zip(grid[0], LATENCIES, strict=True):
        for run, latencies in zip(runs, samples, strict=True):
            if count := len(latencies[name]):
                values = np.maximum(1e3 * np.sort(latencies[name]), LEAST)
                axes.plot(values, np.arange(1, count + 1) / count, label=run["label"])
                axes.set_xscale("log")
        axes.set(xlabel=f"{LATENCIES[name]}, ms", ylabel="share of all", ylim=(0, 1))
    for axes, name in zip(grid[1], LATENCIES, strict=True):
        drawn = [(run["output_tokens_per_second"], run["latency_ms"][name]) for run in runs if run["latency_ms"][name]]
        drawn.sort(key=lambda pair: pair[0])
        for quantile in ("p50", "p90", "p99") if drawn else ():
            heights = [max(LEAST, latency[quantile]) for _, latency in drawn]
            axes.plot([rate for rate, _ in drawn], heights, marker="o", label=quantile)
            axes.set_yscale("log")
        axes.set(xlabel="output tokens/s", ylabel=f"{LATENCIES[name]}, ms")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    for row in grid:
        if row[0].lines:
            row[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return True
