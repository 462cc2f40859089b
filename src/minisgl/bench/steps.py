"""What each step of a run did and when, noted between the engine and its executor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from minisgl.core.plan import Executor, Masks, StepPlan, StepResult


@dataclass(frozen=True)
class Step:
    """A launched step: rows that decoded, prompt tokens prefilled, rows that got a token."""

    decode_rows: int
    prefill_tokens: int
    sampled: int

    @classmethod
    def of(cls, plan: StepPlan) -> Step:
        """What a plan will do."""
        return cls(len(plan.decode_slots), len(plan.prefill_tokens), len(plan.sampled_slots))

    @property
    def decodes_only(self) -> bool:
        """Whether no prompt is prefilled."""
        return self.prefill_tokens == 0


class Relay:
    """An executor that passes everything on to another one."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    @property
    def num_pages(self) -> int:
        """Those of the executor."""
        return self.executor.num_pages

    def launch(self, plan: StepPlan) -> None:
        """Start the step."""
        self.executor.launch(plan)

    def finish(self, masks: Masks) -> None:
        """Finish the step launched last."""
        self.executor.finish(masks)

    def collect(self) -> StepResult:
        """The oldest step's tokens."""
        return self.executor.collect()

    def close(self) -> None:
        """Close the executor."""
        self.executor.close()


class Recorder(Relay):
    """Keeps the steps, with what `collect` waited and when it returned, in s on the clock of `time.perf_counter`."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.steps: list[Step] = []
        self.waits: list[float] = []
        self.collected: list[float] = []

    def launch(self, plan: StepPlan) -> None:
        """Note the step and start it."""
        self.steps.append(Step.of(plan))
        super().launch(plan)

    def collect(self) -> StepResult:
        """The oldest step's tokens; note how long the host waited for them."""
        started = time.perf_counter()
        result = super().collect()
        self.collected.append(time.perf_counter())
        self.waits.append(self.collected[-1] - started)
        return result

    def token_gaps(self) -> list[float]:
        """Seconds between two collected steps, for each step that decoded: how long running requests waited."""
        gaps = (later - earlier for earlier, later in itertools.pairwise(self.collected))
        return [gap for gap, step in zip(gaps, self.steps[1:], strict=True) if step.decode_rows]


def full_decodes(steps: Sequence[Step]) -> list[int]:
    """Indices of the steps that only decode, and as many rows as any such step."""
    most = max((step.decode_rows for step in steps if step.decodes_only), default=0)
    return [index for index, step in enumerate(steps) if step.decodes_only and step.decode_rows == most]


def step_figures(recorder: Recorder) -> dict[str, int | float]:
    """Steps, and of the decode steps with the most rows the median time and the host's mean wait for the device.

    A host that waits has the next step launched already: that wait is how much slower it could be at no cost.
    """
    steps, collected = recorder.steps, recorder.collected
    figures: dict[str, int | float] = {
        "steps": len(steps),
        "steps_with_prefill": sum(not step.decodes_only for step in steps),
    }
    full = [index for index in full_decodes(steps) if index > 0]
    if full:
        figures["largest_decode_batch"] = steps[full[0]].decode_rows
        figures["decode_step_at_largest_batch_ms"] = 1e3 * median(collected[i] - collected[i - 1] for i in full)
        figures["host_waits_per_step_at_largest_batch_ms"] = 1e3 * mean(recorder.waits[i] for i in full)
    return figures
