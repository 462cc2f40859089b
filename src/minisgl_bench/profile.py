"""What each step of a run did, and where a run's time goes on the GPU.

The split is of a second run of the same shapes: tracing all of it would take minutes and slow it down, so a few steps
out of each section stand for the section.
"""

import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, Final, NamedTuple

import torch

from minisgl.core.plan import Executor, StepPlan, StepResult

# Into how many sections the steps are cut that only decode, and those that do not.
SECTIONS: Final = {True: 12, False: 6}
TRACED: Final = 8  # steps of each section that are traced, one after the other
PARTS: Final = ("prefill", "decode attention", "GEMMs", "other kernels", "gaps", "host")
CATEGORIES: Final = ("kernel", "gpu_memcpy", "gpu_memset")
ATTENTION: Final = ("flash", "fmha", "mha", "attention", "attn", "batchdecode", "batchprefill", "xqa", "mergestate",
                    "_decode_kernel", "_merge_kernel", "_prefill_kernel", "_flatten_kernel")  # fmt: skip
GEMMS: Final = ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "matmul", "xmma", "linear",
                "_gate_up_kernel", "_down_kernel")  # fmt: skip


class Step(NamedTuple):
    """A launched step: rows that decoded, prompt tokens prefilled, rows that got a token."""

    decode_rows: int
    prefill_tokens: int
    sampled: int

    @property
    def decodes_only(self) -> bool:
        return self.prefill_tokens == 0


class Recorder:
    """Passes all on to another executor; notes the steps, and how long `collect` waited and when it returned, in s."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.num_pages, self.finish, self.close = executor.num_pages, executor.finish, executor.close
        self.steps: list[Step] = []
        self.waits: list[float] = []
        self.collected: list[float] = []

    def launch(self, plan: StepPlan) -> None:
        self.steps.append(Step(len(plan.decode_slots), len(plan.prefill_tokens), len(plan.sampled_slots)))
        self.executor.launch(plan)

    def collect(self) -> StepResult:
        started = time.perf_counter()
        result = self.executor.collect()
        self.collected.append(time.perf_counter())
        self.waits.append(self.collected[-1] - started)
        return result

    def token_gaps(self) -> list[float]:
        """Seconds between two collected steps, for each step that decoded: how long running requests waited."""
        gaps = (later - earlier for earlier, later in itertools.pairwise(self.collected))
        return [gap for gap, step in zip(gaps, self.steps[1:], strict=True) if step.decode_rows]

    def figures(self) -> dict[str, int | float]:
        """Of the decode steps with the most rows also the median time, and how long the host waited for the device."""
        figures: dict[str, int | float] = {"steps": len(self.steps)}
        figures["steps_with_prefill"] = sum(not step.decodes_only for step in self.steps)
        if full := [index for index in full_decodes(self.steps) if index > 0]:
            times = [self.collected[i] - self.collected[i - 1] for i in full]
            figures["largest_decode_batch"] = self.steps[full[0]].decode_rows
            figures["decode_step_at_largest_batch_ms"] = 1e3 * median(times)
            # a host that waits has launched the next step already: it could be slower by that at no cost
            figures["host_waits_per_step_at_largest_batch_ms"] = 1e3 * mean(self.waits[i] for i in full)
        return figures


def full_decodes(steps: Sequence[Step]) -> list[int]:
    """Indices of the steps that only decode, and as many rows as any such step."""
    most = max((step.decode_rows for step in steps if step.decodes_only), default=0)
    return [index for index, step in enumerate(steps) if step.decodes_only and step.decode_rows == most]


class Activity(NamedTuple):
    """A kernel, copy or fill on the device; seconds."""

    start: float
    end: float
    category: str
    name: str

    @property
    def ends_step(self) -> bool:
        """Whether it takes a step's tokens to the host, the last thing a step does."""
        return self.category == "gpu_memcpy" and "DtoH" in self.name

    @property
    def kind(self) -> str:
        name = self.name.lower() if self.category == "kernel" else ""
        if any(word in name for word in ATTENTION):
            return "attention"
        return "gemm" if any(word in name for word in GEMMS) else "other"


def activities(trace: Mapping[str, Any]) -> list[Activity]:
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and (category := event.get("cat")) in CATEGORIES:
            start = float(event["ts"]) / 1e6
            found.append(Activity(start, start + float(event["dur"]) / 1e6, category, event["name"]))
    return sorted(found)


class DeviceTime:
    """Where the time of some steps that followed one another went, in s. What two activities share is the earlier's."""

    def __init__(self, timeline: Sequence[Activity]) -> None:
        self.kernels: defaultdict[str, float] = defaultdict(float)  # by kind: attention, gemm, other
        self.gaps = 0.0  # the device's idle time inside of steps
        self.between: list[float] = []  # from the last kernel of a step to the first of the next, for each two steps
        clock = idle = 0.0
        started = ended = False  # a kernel came; since the last kernel a step ended
        for activity in timeline:
            idle += max(0.0, activity.start - clock)
            if activity.category == "kernel":
                if started and ended:
                    self.between.append(idle)
                elif started:
                    self.gaps += idle
                idle, started, ended = 0.0, True, False
            ended |= activity.ends_step
            busy = max(0.0, activity.end - max(activity.start, clock))
            self.kernels[activity.kind] += busy
            clock = max(activity.end, clock)


class TorchProfiler:
    """Traces what is launched between `start` and `stop`, which waits for it: whole steps, on the device alone."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.start()

    def stop(self) -> list[Activity]:
        torch.cuda.synchronize()
        self.profile.stop()
        with tempfile.TemporaryDirectory() as folder:  # Chrome's format is the one that does not change
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            return activities(json.loads(path.read_text()))


class StepTrace(NamedTuple):
    steps: list[Step]
    weight: float
    timeline: list[Activity]


class Tracer(Recorder):
    def __init__(self, executor: Executor, chosen: Mapping[int, float], profiler: TorchProfiler) -> None:
        super().__init__(executor)
        self.chosen = chosen
        self.profiler = profiler
        self.traces: list[StepTrace] = []
        self._first: int | None = None  # index of the first step of a trace that runs

    def launch(self, plan: StepPlan) -> None:
        index, prefills = len(self.steps), len(plan.prefill_tokens) > 0
        if index not in self.chosen or (self.steps and self.steps[-1].decodes_only == prefills):
            self.end_trace()
        if index in self.chosen and self._first is None:
            self.profiler.start()
            self._first = index
        super().launch(plan)

    def end_trace(self) -> None:
        if self._first is not None:
            weight = mean(self.chosen[index] for index in range(self._first, len(self.steps)))
            self.traces.append(StepTrace(self.steps[self._first :], weight, self.profiler.stop()))
            self._first = None


def choose_steps(steps: Sequence[Step]) -> dict[int, float]:
    weights: dict[int, float] = {}
    for decodes_only, count in SECTIONS.items():
        indices = [index for index, step in enumerate(steps) if step.decodes_only == decodes_only]
        bounds = [len(indices) * i // count for i in range(count + 1)]
        for low, high in itertools.pairwise(bounds):
            taken = min(TRACED, high - low)
            first = low + (high - low - taken) // 2
            weights |= dict.fromkeys(indices[first : first + taken], (high - low) / max(taken, 1))
    return weights


def split_time(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """A whole run's seconds on the device by part of PARTS, as the traced steps stand for it.

    Before a trace's first step the device idles as long as between the others. `between_ms` is its mean idle time
    before a decode step of the most rows: what the host adds to such a step.
    """
    most = max((step.decode_rows for trace in traces for step in trace.steps if step.decodes_only), default=0)
    seconds = dict.fromkeys(PARTS, 0.0)
    full: list[float] = []
    for steps, weight, timeline in traces:
        spent = DeviceTime(timeline)
        if steps[0].decodes_only:
            seconds["decode attention"] += weight * spent.kernels["attention"]
            seconds["GEMMs"] += weight * spent.kernels["gemm"]
            seconds["other kernels"] += weight * spent.kernels["other"]
        else:
            seconds["prefill"] += weight * sum(spent.kernels.values())
        seconds["gaps"] += weight * spent.gaps
        if spent.between:
            seconds["host"] += weight * mean(spent.between) * sum(step.sampled > 0 for step in steps)
        if all(step.decodes_only and step.decode_rows == most for step in steps):
            full += spent.between
    return {
        "seconds": seconds,
        "between_ms": 1e3 * mean(full) if full else None,
        "traced_steps": sum(len(trace.steps) for trace in traces),
    }


def profile(
    executor: Executor, steps: Sequence[Step], run: Callable[[Tracer], None], profiler: TorchProfiler | None = None
) -> dict[str, Any]:
    tracer = Tracer(executor, choose_steps(steps), profiler or TorchProfiler())
    run(tracer)
    tracer.end_trace()
    return split_time(tracer.traces)
