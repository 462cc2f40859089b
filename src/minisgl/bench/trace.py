"""A GPU's trace, as torch.profiler writes it, taken apart: whose kernels took how long, and when the device idled."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

CATEGORIES: Final = ("kernel", "gpu_memcpy", "gpu_memset")
ATTENTION: Final = ("flash", "fmha", "mha", "attention", "attn", "batchdecode", "batchprefill", "xqa", "mergestate",
                    "_decode_kernel", "_merge_kernel", "_prefill_kernel", "_flatten_kernel")  # fmt: skip
PRODUCTS: Final = ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "matmul", "xmma", "linear",
                   "_gate_up_kernel", "_down_kernel")  # fmt: skip


@dataclass(frozen=True, order=True)
class Activity:
    """A kernel, copy or fill on the device; seconds."""

    start: float
    end: float
    category: str
    name: str

    @property
    def is_kernel(self) -> bool:
        """Whether it computes."""
        return self.category == "kernel"

    @property
    def ends_step(self) -> bool:
        """Whether it takes a step's tokens to the host, the last thing a step does."""
        return self.category == "gpu_memcpy" and "DtoH" in self.name


@dataclass
class StepTime:
    """Where one step's time went, in seconds.

    `kernels` are by kind ("attention", "products", "other"); `gaps` the device's idle time between the step's first
    kernel and its last; `between` its idle time from the last kernel of the step before to the first of this one, and
    None where the step before was not traced.
    """

    kernels: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    gaps: float = 0.0
    between: float | None = None
    by_name: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def busy(self) -> float:
        """Time in kernels and copies."""
        return sum(self.kernels.values())


def kind(activity: Activity) -> str:
    """What an activity is for, from its name."""
    name = activity.name.lower()
    if activity.is_kernel and any(word in name for word in ATTENTION):
        return "attention"
    if activity.is_kernel and any(word in name for word in PRODUCTS):
        return "products"
    return "other"


def activities(trace: Mapping[str, Any]) -> list[Activity]:
    """What ran on the device, in order, from a trace in Chrome's format (times in microseconds)."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and (category := event.get("cat")) in CATEGORIES:
            start = float(event["ts"]) / 1e6
            found.append(Activity(start, start + float(event["dur"]) / 1e6, category, event["name"]))
    return sorted(found)


def read_trace(path: Path) -> list[Activity]:
    """What ran on the device, from the file that `export_chrome_trace` wrote."""
    return activities(json.loads(path.read_text()))


def by_step(timeline: Iterable[Activity], steps: int) -> list[list[Activity]]:
    """The timeline cut after each step's copy to the host; what follows the last one belongs to it.

    Where there are not as many such copies as steps, all is one step.
    """
    parts: list[list[Activity]] = [[]]
    for activity in timeline:
        parts[-1].append(activity)
        if activity.ends_step:
            parts.append([])
    rest = parts.pop()
    if len(parts) != steps:
        return [[*(activity for part in parts for activity in part), *rest]]
    parts[-1] += rest
    return parts


def step_times(parts: Sequence[Sequence[Activity]]) -> list[StepTime]:
    """Each step's account. Time that two activities share counts once, for the earlier one."""
    times = []
    clock: float | None = None
    pending = 0.0  # idle since the last kernel of the step before
    for part in parts:
        time = StepTime(between=None if clock is None else 0.0)
        ahead = sum(activity.is_kernel for activity in part)
        started = False
        for activity in part:
            idle = 0.0 if clock is None else max(0.0, activity.start - clock)
            if activity.is_kernel and not started:
                started = True
                if time.between is not None:
                    time.between = pending + idle
                idle = pending = 0.0
            if started and ahead > 0:
                time.gaps += idle
            else:
                pending += idle
            ahead -= activity.is_kernel
            busy = max(0.0, activity.end - max(activity.start, clock or activity.start))
            time.kernels[kind(activity)] += busy
            time.by_name[activity.name] += busy
            clock = max(activity.end, clock or activity.end)
        times.append(time)
    return times
