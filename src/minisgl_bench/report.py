"""What every benchmark says beside its figures: hardware, versions, command, tables, files and pictures."""

import contextlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from minisgl.config import BUNDLED_MODEL, Config
from minisgl.errors import ConfigError

PACKAGES: Final = ("minisgl", "torch", "numpy", "transformers", "triton", "flashinfer-python", "flash-attn-3", "vllm")
RESULTS: Final = Path("benchmark/results")
QUANTILES: Final = ("p50", "p90", "p99")
LATENCIES: Final = {
    "ttft": "time to first token", "tpot": "time per output token", "itl": "between two events", "e2e": "end to end",
}  # fmt: skip
GPU_HOURS: Final = "gpu_hours_per_million_output_tokens"
# Where an axis begins, in ms: events that come together are 0 apart, which a logarithm cannot show.
LEAST: Final = 1e-3


def hardware() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def gpu_name() -> str:
    """The GPU's name without its maker's, or `CPU`; fit for a file name."""
    return slug(torch.cuda.get_device_name(0).removeprefix("NVIDIA ") if torch.cuda.is_available() else "CPU")


def slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-")


def on_gpu(config: Config) -> bool:
    return torch.cuda.is_available() and config.device != "cpu"


def default_path(model: str, benchmark: str) -> Path:
    return RESULTS / f"{slug(model)}-{gpu_name()}-{benchmark}.json"


def engine_path(config: Config, asked: Path | None, benchmark: str) -> Path | None:
    """Where the report of an engine goes: what was asked for, on a GPU else the default, and nowhere on a CPU."""
    return asked or (default_path(config.model or BUNDLED_MODEL, benchmark) if on_gpu(config) else None)


class Report:
    """Figures of one benchmark. Raises ConfigError where `path` cannot be written: before minutes of measuring."""

    def __init__(self, name: str, arguments: Sequence[str], path: Path | None, width: int = 0) -> None:
        require_writable(path)
        command = [Path(sys.executable).name, "-m", "minisgl", "bench", name, *arguments]
        self.path = path
        self.console = Console(width=max(width, Console().width), soft_wrap=True, highlight=False, markup=False)
        self.figures: dict[str, Any] = {"command": shlex.join(command), "hardware": hardware(), "versions": versions()}

    def print(self, *parts: str | Table) -> None:
        self.console.print(*parts, sep="\n")

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.figures, indent=2) + "\n")

    def finish(self, draw: Callable[[Any], None] | None = None) -> None:
        """Write, and beside it the picture that `draw` makes on matplotlib's figure, where that is installed."""
        self.write()
        if self.path is not None:
            picture, note = self.path.with_suffix(".png"), ""
            if draw is not None:
                note = f" and {picture}" if draw_file(picture, draw) else "; a picture needs minisgl[plot]"
            self.print(f"written to {self.path}{note}")


def require_writable(path: Path | None) -> None:
    """Make the report's folder where it is RESULTS; raise ConfigError where the file cannot be written."""
    if path is None:
        return
    try:
        if path.parent == RESULTS:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}; give --json FILE") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path}: not a file that can be written")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def draw_file(path: Path, draw: Callable[[Any], None]) -> bool:
    """Write a picture; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)
    return True


def draw_ablation(figure: Any, title: str, bars: Sequence[tuple[str, str, float]]) -> None:
    """A bar for each variant: its group, name, and rate relative to the default."""
    figure.set_size_inches(10, 1.2 + 0.24 * len(bars))
    groups = list(dict.fromkeys(group for group, _, _ in bars))
    axes = figure.add_subplot()
    colours = [f"C{groups.index(group)}" for group, _, _ in bars]
    drawn = axes.barh(distinct([name for _, name, _ in bars]), [share for _, _, share in bars], color=colours)
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="output tokens/s, relative to the default on the same workload", title=title)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, a number behind those that came before: bars of one name would lie on each other."""
    return [name if name not in names[:i] else f"{name} {names[:i].count(name) + 1}" for i, name in enumerate(names)]


def draw_latencies(
    figure: Any, title: str, runs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], sweep: bool = True
) -> None:
    """Each run's distributions of `samples`, in s by name, and below them quantiles.

    Those of a `sweep` of loads are drawn against throughput, those of runs that differ in more line by line.
    """
    figure.set_size_inches(15, 8 if sweep else 6 + 0.3 * len(runs))
    grid = figure.subplots(2, 4)
    for axes, below, name in zip(*grid, LATENCIES, strict=True):
        for run, latencies in zip(runs, samples, strict=True):
            if len(latencies[name]):
                axes.ecdf(np.maximum(1e3 * latencies[name], LEAST), label=run["label"])
                axes.set_xscale("log")
        axes.set(xlabel=f"{LATENCIES[name]}, ms", ylabel="share of all", ylim=(0, 1))
        drawn = [run for run in runs if run["latency_ms"][name]]
        if sweep:
            drawn.sort(key=lambda run: float(run["output_tokens_per_second"]))
        rates, labels = [run["output_tokens_per_second"] for run in drawn], distinct([run["label"] for run in drawn])
        for quantile in QUANTILES if drawn else ():
            spots = [max(LEAST, run["latency_ms"][name][quantile]) for run in drawn]
            places = (rates, spots) if sweep else (spots, labels)
            below.plot(*places, marker="o", linestyle="-" if sweep else "", label=quantile)
        if sweep:
            below.set(xlabel="output tokens/s", ylabel=f"{LATENCIES[name]}, ms", yscale="log" if drawn else "linear")
        else:
            below.set(xlabel=f"{LATENCIES[name]}, ms")
            below.set_xlim(left=0)
            below.invert_yaxis()
            below.tick_params(labelleft=below is grid[1][0])
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    if sweep and grid[0][0].lines:
        grid[0][0].legend(fontsize="small")
    elif not sweep:
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    if grid[1][0].lines:
        grid[1][0].legend(fontsize="small")
    figure.suptitle(title)


def draw_fleet(figure: Any, title: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """Figures against replicas, a line for the runs that differ in nothing else."""
    figure.set_size_inches(14, 8)
    figures: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "goodput, requests/s": lambda run: float(run["goodput_requests_per_second"]),
        "time to first token, p99, ms": lambda run: float(run["latency_ms"]["ttft"].get("p99", np.nan)),
        "share of prompt tokens cached": lambda run: float(run["reported_hit_rate"] or 0.0),
        "GPU hours for a million output tokens": lambda run: float(run[GPU_HOURS]),
    }
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        name = ", ".join(part for part in run["label"].split(", ") if not part.startswith("replicas "))
        lines.setdefault(name, []).append(run)
    for axes, (text, figure_of) in zip(figure.subplots(2, 2).flat, figures.items(), strict=True):
        for name, line in lines.items():
            axes.plot([run["replicas"] for run in line], [figure_of(run) for run in line], marker="o", label=name)
        axes.set(xlabel="replicas", ylabel=text, ylim=(0, None), xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title)
