"""What a process has counted at one moment, such that the counts of several processes add up to those of the server."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import msgspec
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric

from minisgl.server.limits import Queue
from minisgl.server.metrics import Histogram, Metrics

K = TypeVar("K", bound=Hashable)
N = TypeVar("N", int, float)

START_TIME = "process_start_time_seconds"


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of `Metrics`, and what else /metrics shows of an API process, under the same names.

    `histograms` has for each its counts by upper bound and the sum of its values; `process` has what the system says
    of CPU, memory and files, under Prometheus' names. `processes` are those that the counts are of.
    """

    histograms: dict[str, tuple[tuple[int, ...], float]]
    finished: dict[str, int]
    rejected: dict[str, int]
    responses: dict[tuple[str, str, int], int]
    process: dict[str, float]
    preparing: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    tokenizers: int = 0
    processes: int = 1

    @classmethod
    def of(cls, metrics: Metrics, queue: Queue, tokenizers: int) -> Tally:
        """This process' counts; `tokenizers` are the tokenizer processes that it has."""
        histograms = {name: value for name, value in vars(metrics).items() if isinstance(value, Histogram)}
        return cls(
            histograms={name: (tuple(value.counts), value.sum) for name, value in histograms.items()},
            finished=dict(metrics.finished),
            rejected=dict(metrics.rejected),
            responses=dict(metrics.responses),
            process={sample.name: sample.value for family in process_families() for sample in family.samples},
            preparing=metrics.preparing,
            queued_requests=queue.requests,
            queued_tokens=queue.tokens,
            tokenizers=tokenizers,
        )

    def plus(self, other: Tally) -> Tally:
        """Both together; the start time is the earlier one."""
        counts = dict(self.histograms)
        for name, (theirs, total) in other.histograms.items():
            ours, sum_of_ours = counts.get(name, ((0,) * len(theirs), 0.0))
            counts[name] = tuple(a + b for a, b in zip(ours, theirs, strict=True)), sum_of_ours + total
        process = added(self.process, other.process)
        if starts := [tally.process[START_TIME] for tally in (self, other) if START_TIME in tally.process]:
            process[START_TIME] = min(starts)
        return Tally(
            histograms=counts,
            finished=added(self.finished, other.finished),
            rejected=added(self.rejected, other.rejected),
            responses=added(self.responses, other.responses),
            process=process,
            preparing=self.preparing + other.preparing,
            queued_requests=self.queued_requests + other.queued_requests,
            queued_tokens=self.queued_tokens + other.queued_tokens,
            tokenizers=self.tokenizers + other.tokenizers,
            processes=self.processes + other.processes,
        )

    @property
    def settled(self) -> Tally:
        """What is left of these counts when their process has ended: what was counted up, and nothing that it had."""
        kept = {name: value for name, value in self.process.items() if name.endswith("_total") or name == START_TIME}
        return msgspec.structs.replace(
            self, process=kept, preparing=0, queued_requests=0, queued_tokens=0, tokenizers=0, processes=0
        )


NOTHING = Tally(histograms={}, finished={}, rejected={}, responses={}, process={}, processes=0)


def added(one: dict[K, N], other: dict[K, N]) -> dict[K, N]:
    """The values of both, by key."""
    both = dict(one)
    for key, value in other.items():
        both[key] = both[key] + value if key in both else value
    return both


def total(tallies: Iterable[Tally]) -> Tally:
    """All together."""
    whole = NOTHING
    for tally in tallies:
        whole = whole.plus(tally)
    return whole


def process_families() -> list[Metric]:
    """What the system says of this process, as Prometheus' metrics."""
    return list(ProcessCollector(registry=None).collect())
