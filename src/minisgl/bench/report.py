"""What every benchmark says beside its figures: hardware, versions, command, configuration."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from minisgl.errors import ConfigError

PACKAGES: Final = (
    "minisgl", "torch", "numpy", "transformers", "triton", "flashinfer-python", "flash-attn-3", "flash-attn", "vllm",
)  # fmt: skip
RESULTS: Final = Path("benchmark/results")


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, torch's threads, and the GPUs."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that bear on speed, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def card_name() -> str:
    """The GPU's name without its maker's, or `CPU`; fit for a file name."""
    name = torch.cuda.get_device_name(0).removeprefix("NVIDIA ") if torch.cuda.is_available() else "CPU"
    return slug(name)


def slug(name: str) -> str:
    """The last part of a path or id, in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-")


def default_path(model: str, benchmark: str) -> Path:
    """Where a benchmark on a GPU writes its figures unless told otherwise: under the present folder."""
    return RESULTS / f"{slug(model)}-{card_name()}-{benchmark}.json"


def process_seconds() -> float:
    """Seconds since this process started, by Linux's account (proc(5), field 22 of /proc/self/stat)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def require_writable(path: Path | None, flag: str = "--json") -> None:
    """Make the report's folder where it is RESULTS; raise ConfigError before minutes of measuring if it is in vain."""
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
    """Write the figures and what is needed to measure them again, as JSON."""
    report = {
        "command": shlex.join([Path(sys.executable).name, "-m", "minisgl", "bench", name, *arguments]),
        "hardware": hardware(),
        "versions": versions(),
        **figures,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
