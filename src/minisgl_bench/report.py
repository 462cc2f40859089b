"""What every benchmark says beside its figures: hardware, versions, command, configuration."""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from minisgl.config import BUNDLED_MODEL, Config
from minisgl.errors import ConfigError

PACKAGES: Final = (
    "minisgl", "torch", "numpy", "transformers", "triton", "flashinfer-python", "flash-attn-3", "flash-attn", "vllm",
)  # fmt: skip
RESULTS: Final = Path("benchmark/results")


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
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def gpu_name() -> str:
    """The GPU's name without its maker's, or `CPU`; fit for a file name."""
    return slug(torch.cuda.get_device_name(0).removeprefix("NVIDIA ") if torch.cuda.is_available() else "CPU")


def slug(name: str) -> str:
    """The last part of a path or id, in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-")


def on_gpu(config: Config) -> bool:
    return torch.cuda.is_available() and config.device != "cpu"


def default_path(model: str, benchmark: str) -> Path:
    """Where a benchmark on a GPU writes its figures unless told otherwise: under the present folder."""
    return RESULTS / f"{slug(model)}-{gpu_name()}-{benchmark}.json"


def report_path(config: Config, asked: Path | None, benchmark: str) -> Path | None:
    """Where the report goes: what was asked for, on a GPU else the default, and nowhere on a CPU.

    Raises ConfigError where it cannot be written: before minutes of measuring in vain.
    """
    path = asked
    if asked is None and on_gpu(config):
        path = default_path(config.model or BUNDLED_MODEL, benchmark)
    require_writable(path)
    return path


def require_writable(path: Path | None, flag: str = "--json") -> None:
    """Make the report's folder where it is RESULTS; raise ConfigError where the file cannot be written."""
    if path is None:
        return
    try:
        if path.parent == RESULTS:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}; give {flag} FILE") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: not a file that can be written")


def write_report(path: Path, name: str, arguments: Sequence[str], figures: Mapping[str, Any]) -> None:
    report = {
        "command": shlex.join([Path(sys.executable).name, "-m", "minisgl", "bench", name, *arguments]),
        "hardware": hardware(),
        "versions": versions(),
        **figures,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def process_seconds() -> float:
    """Seconds since this process started, by Linux's account (proc(5), field 22 of /proc/self/stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def console(width: int = 0) -> Console:
    """Standard output in `width` columns at least; a narrower terminal wraps lines."""
    return Console(width=max(width, Console().width), soft_wrap=True, highlight=False, markup=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """Rows of text; the first `left` columns are aligned to the left, the others to the right."""
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        made.add_row(*row)
    return made
