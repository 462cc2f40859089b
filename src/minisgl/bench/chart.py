"""An ablation's figures as a table in the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from minisgl.bench.trials import Measurement


def defaults(measured: Sequence[Measurement]) -> dict[str, Measurement]:
    """For each scenario the first measurement of the configuration as it is."""
    found: dict[str, Measurement] = {}
    for item in measured:
        if item.variant.group == "default" and item.error is None:
            found.setdefault(item.variant.scenario, item)
    return found


def ratio(item: Measurement, measured: Sequence[Measurement]) -> float | None:
    """A variant's tokens/s over those of the default on the same scenario; None where either failed."""
    base = defaults(measured).get(item.variant.scenario)
    return None if base is None or item.error is not None else item.tokens_per_second / base.tokens_per_second


def ablation_table(title: str, measured: Sequence[Measurement]) -> Table:
    """A row for each variant."""
    table = Table(title=title)
    table.add_column("setting")
    table.add_column("workload")
    for name in ("tokens/s", "from – to", "of default", "cached", "gap p99 ms", "gap max ms", "build s", "other GiB"):
        table.add_column(name, justify="right")
    for item in measured:
        if item.error is not None:
            table.add_row(item.variant.name, item.variant.scenario, f"failed: {item.error}")
            continue
        share = ratio(item, measured)
        table.add_row(
            item.variant.name,
            item.variant.scenario,
            f"{item.tokens_per_second:,.0f}",
            f"{min(item.each_tokens_per_second):,.0f} – {max(item.each_tokens_per_second):,.0f}",
            "" if share is None else f"{share:.3f}",
            f"{item.cached_tokens / item.input_tokens:.0%}",
            f"{item.token_gap_p99_ms:.1f}",
            f"{item.token_gap_max_ms:.1f}",
            f"{item.build_seconds:.1f}",
            f"{item.other_gib:.2f}",
        )
    return table


def draw_chart(path: Path, title: str, measured: Sequence[Measurement]) -> bool:
    """Write a bar for each variant, relative to its default, as a picture; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    bars = [(item.variant, share) for item in measured if (share := ratio(item, measured)) is not None]
    names = [f"{variant.name} ({variant.scenario})" for variant, _ in bars]
    groups = list(dict.fromkeys(variant.group for variant, _ in bars))
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    colours = [f"C{groups.index(variant.group)}" for variant, _ in bars]
    drawn = axes.barh(names_apart(names), [share for _, share in bars], color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("output tokens/s, relative to the default on the same workload")
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    return True


def names_apart(names: Sequence[str]) -> list[str]:
    """The names, a number behind those that came before: bars of one name would lie on each other."""
    return [name if name not in names[:i] else f"{name} {names[:i].count(name) + 1}" for i, name in enumerate(names)]
