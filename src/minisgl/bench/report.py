"""What every benchmark says beside its figures: hardware, versions, command, configuration."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from minisgl.errors import ConfigError

PACKAGES: Final = ("minisgl", "torch", "numpy", "transformers", "triton", "flashinfer-python")


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


def require_writable(path: Path | None) -> None:
    """Raise ConfigError before minutes of measuring when the report could not be written."""
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ConfigError(f"--json {path}: not a file that can be written")


def write_report(path: Path, name: str, arguments: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Write the figures and what is needed to measure them again, as JSON."""
    report = {
        "command": shlex.join([Path(sys.executable).name, "-m", "minisgl", "bench", name, *arguments]),
        "hardware": hardware(),
        "versions": versions(),
        **figures,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
