"""Where a run's time goes on the GPU: a second run of the same shapes, of which some steps are traced and weighted.

Tracing a whole run would take minutes and slow it down. A decode step differs from its neighbours by one token a
row, so a few steps out of each stretch stand for the stretch; steps with prefill are traced more densely.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Final, Protocol

import torch

from minisgl.bench.steps import Relay, Step, full_decodes
from minisgl.bench.trace import Activity, StepTime, by_step, read_trace, step_times
from minisgl.core.plan import Executor, StepPlan

STRETCHES: Final = {True: 12, False: 6}
"""Into how many stretches the steps are cut that only decode, and those that do not."""
TRACED: Final = 8
"""Steps of each stretch that are traced, one after the other."""
TOP: Final = 16
PARTS: Final = ("prefill", "decode attention", "matrix products", "other kernels", "gaps", "host")


def sample_steps(steps: Sequence[Step]) -> dict[int, float]:
    """Which steps to trace, and how many steps each stands for."""
    weights: dict[int, float] = {}
    for decodes_only, count in STRETCHES.items():
        indices = [index for index, step in enumerate(steps) if step.decodes_only == decodes_only]
        bounds = [len(indices) * i // count for i in range(count + 1)]
        for low, high in itertools.pairwise(bounds):
            taken = min(TRACED, high - low)
            first = low + (high - low - taken) // 2
            weights |= dict.fromkeys(indices[first : first + taken], (high - low) / max(taken, 1))
    return weights


class Profiler(Protocol):
    """What is needed of a profiler."""

    def start(self) -> None:
        """Begin to trace what is launched from here on."""

    def stop(self) -> list[Activity]:
        """Wait for what was launched; what ran since `start`."""


class TorchProfiler:
    """torch.profiler, looking at the device alone."""

    def __init__(self) -> None:
        self._profile: torch.profiler.profile | None = None

    def start(self) -> None:
        """Wait for the device, so that a trace begins and ends with whole steps."""
        torch.cuda.synchronize()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()

    def stop(self) -> list[Activity]:
        """The trace goes through a file, in the one format that does not change between versions."""
        assert self._profile is not None
        torch.cuda.synchronize()
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return read_trace(path)


@dataclass(frozen=True)
class Traced:
    """Steps launched while a trace ran, by index, and what the device did."""

    indices: list[int]
    timeline: list[Activity]


class Tracer(Relay):
    """Traces the steps with the indices it is given."""

    def __init__(self, executor: Executor, chosen: Mapping[int, float], profiler: Profiler) -> None:
        super().__init__(executor)
        self.chosen = chosen
        self.profiler = profiler
        self.steps: list[Step] = []
        self.traced: list[Traced] = []
        self._indices: list[int] = []

    def launch(self, plan: StepPlan) -> None:
        """Start the step, inside a trace if it is one of the chosen."""
        index = len(self.steps)
        self.steps.append(Step.of(plan))
        if index in self.chosen and not self._indices:
            self.profiler.start()
        super().launch(plan)
        if index in self.chosen:
            self._indices.append(index)
            if index + 1 not in self.chosen:
                self.end_trace()

    def end_trace(self) -> None:
        """End a trace that runs."""
        if self._indices:
            self.traced.append(Traced(self._indices, self.profiler.stop()))
            self._indices = []


@dataclass(frozen=True)
class Account:
    """Some traced steps that are told apart in the trace, and the time of each."""

    steps: list[Step]
    weights: list[float]
    times: list[StepTime]


def account(traced: Traced, steps: Sequence[Step], chosen: Mapping[int, float]) -> Account:
    """Match a trace's parts with its steps.

    A step that samples nothing copies nothing back: it joins the one after it, or as the last the one before.
    """
    groups: list[list[int]] = []
    joining = False
    for index in traced.indices:
        if joining:
            groups[-1].append(index)
        else:
            groups.append([index])
        joining = steps[index].sampled == 0
    if joining and len(groups) > 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    parts = by_step(traced.timeline, len(groups))
    if len(parts) != len(groups):
        groups = [traced.indices]
    members = [[steps[index] for index in group] for group in groups]
    joined = [
        Step(max(s.decode_rows for s in group), sum(s.prefill_tokens for s in group), sum(s.sampled for s in group))
        for group in members
    ]
    return Account(joined, [mean(chosen[index] for index in group) for group in groups], step_times(parts))


@dataclass(frozen=True, kw_only=True)
class Split:
    """A whole run's seconds on the device by part of PARTS, as the traced steps stand for it.

    `between_ms` is the device's mean idle time before a decode step of the most rows, in milliseconds: what the host
    adds to such a step. `kernels` holds the names of the longest kernels with their seconds.
    """

    seconds: dict[str, float]
    between_ms: float | None
    traced_steps: int
    kernels: dict[str, float]


def split(accounts: Sequence[Account], steps: Sequence[Step]) -> Split:
    """Weight what was traced. Where the step before was not traced, the time between is the mean of the others."""
    most = [steps[index] for index in full_decodes(steps)][:1]
    seconds = dict.fromkeys(PARTS, 0.0)
    kernels: defaultdict[str, float] = defaultdict(float)
    full: list[float] = []
    for item in accounts:
        known = [time.between for time in item.times if time.between is not None]
        for step, weight, time in zip(item.steps, item.weights, item.times, strict=True):
            between = time.between if time.between is not None else mean(known or [0.0])
            if step.decodes_only:
                seconds["decode attention"] += weight * time.kernels["attention"]
                seconds["matrix products"] += weight * time.kernels["products"]
                seconds["other kernels"] += weight * time.kernels["other"]
            else:
                seconds["prefill"] += weight * time.busy
            seconds["gaps"] += weight * time.gaps
            seconds["host"] += weight * between
            for name, spent in time.by_name.items():
                kernels[name[:120]] += weight * spent
            if time.between is not None and most and step.decodes_only and step.decode_rows == most[0].decode_rows:
                full.append(time.between)
    return Split(
        seconds=seconds,
        between_ms=1e3 * mean(full) if full else None,
        traced_steps=sum(len(item.steps) for item in accounts),
        kernels=dict(sorted(kernels.items(), key=lambda item: -item[1])[:TOP]),
    )


def profile(
    executor: Executor, steps: Sequence[Step], run: Callable[[Tracer], None], profiler: Profiler | None = None
) -> Split:
    """Split the time of a run whose `steps` are known, by `run`, which runs it again with the executor it is given."""
    chosen = sample_steps(steps)
    tracer = Tracer(executor, chosen, profiler or TorchProfiler())
    run(tracer)
    tracer.end_trace()
    return split([account(traced, tracer.steps, chosen) for traced in tracer.traced], tracer.steps)
