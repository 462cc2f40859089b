"""When requests are sent where no trace says it: renewal processes of a given rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from minisgl.bench.online.sessions import Session


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Times in s, float64[count], the first one 0. Gaps have mean 1 / `rate` and are drawn from a gamma distribution.

    `burstiness` is the distribution's shape: 1 is a Poisson process, below that requests come in bursts, infinity
    spaces them evenly. The gaps' coefficient of variation is 1 / sqrt(burstiness).
    """
    if math.isinf(burstiness):
        return np.arange(count) / rate
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count - 1)
    return np.concatenate(([0.0], np.cumsum(gaps)))


def with_arrivals(sessions: Sequence[Session], rate: float, burstiness: float, seed: int) -> list[Session]:
    """The sessions, in their order, at such times."""
    times = arrival_times(len(sessions), rate, burstiness, seed)
    return [dataclasses.replace(session, due=float(due)) for session, due in zip(sessions, times, strict=True)]
