"""When to launch a step: just before the one that runs ends, so that it takes in whoever arrives until then."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from minisgl.core.plan import StepPlan

FIRST_SLACK: Final = 5e-4  # s by which a step is in the stream before the one before it ends, at first
LEAST_SLACK, MOST_SLACK = 2e-4, 5e-3
WAITED: Final = 2e-5  # s: a result that took less to come was there already
ROWS, TOKENS = 16, 64  # steps that differ by less take about the same time
FIRST_LAUNCH: Final = 1e-3  # s until the device has work of a step: it computes what was launched while more is
TRIALS: Final = 3  # steps of a shape that are seen before it is predicted: kernels compile in the first
OUTLIER: Final = 1.5  # a step that took so many times the mean counts as if it had taken this

Shape = tuple[int, int]


@dataclass
class Estimate:
    """Seconds that steps of a shape take."""

    mean: float = math.inf
    spread: float = 0.0  # mean distance from the mean
    count: int = 0

    def take(self, seconds: float, waited: bool) -> None:
        """`waited`: the step took that long; otherwise it ended at some time before."""
        self.count += 1
        if self.count <= TRIALS:
            self.mean = min(self.mean, seconds)
        elif waited:
            off = min(seconds, OUTLIER * self.mean) - self.mean
            self.mean += off / 8
            self.spread += (abs(off) - self.spread) / 8
        else:
            self.mean = 0.9 * min(self.mean, seconds)


class LaunchTimer:
    """Predicts when the running step ends, from running means of earlier ones of its shape.

    A step is to be launched when that time is as far off as planning and launching take, and some slack. The slack
    grows when a step came too late, so that the device was idle, and shrinks slowly. `clock` tells seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._estimates: defaultdict[Shape, Estimate] = defaultdict(Estimate)
        self._host = 0.0  # s until a step has work for the device, the most of late
        self._slack = FIRST_SLACK
        self._launched: deque[tuple[Shape, float]] = deque()  # with when the device may have begun; the oldest runs

    def launched(self, plan: StepPlan, planned: float, launched: float, sent: float) -> None:
        """The host planned a step from `planned` on, and launched it from `launched` until `sent`."""
        tokens, rows = len(plan.prefill_tokens), len(plan.decode_slots)
        ready = min(sent, launched + FIRST_LAUNCH)
        self._launched.append(((-(-rows // ROWS), -(-tokens // TOKENS)), ready))
        self._host = max(ready - planned, self._host + (ready - planned - self._host) / 16)

    def collected(self, awaited: float, arrived: float) -> None:
        """The host waited from `awaited` to `arrived` for the result of the oldest step."""
        shape, began = self._launched.popleft()
        waited = arrived - awaited > WAITED
        self._estimates[shape].take(arrived - began, waited)
        if self._launched:
            following, ready = self._launched[0]
            self._launched[0] = following, max(ready, arrived)
            late = arrived - ready < LEAST_SLACK / 2 if waited else awaited - ready < LEAST_SLACK / 2
            self._slack = min(1.5 * self._slack, MOST_SLACK) if late else max(0.99 * self._slack, LEAST_SLACK)

    def wait(self) -> float:
        """Seconds from now to the next launch; 0 where there is nothing to wait for or nothing known."""
        if len(self._launched) != 1:
            return 0.0
        shape, began = self._launched[0]
        estimate = self._estimates[shape]
        if estimate.count < TRIALS:
            return 0.0
        end = began + estimate.mean - 2 * estimate.spread
        return max(0.0, end - self._host - self._slack - self._clock())
