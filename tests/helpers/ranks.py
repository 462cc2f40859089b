"""A tensor-parallel group whose ranks are threads of one process, and an executor that runs plans on all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.executor import LocalExecutor, build_local_executor
from minisgl.core.model_config import ModelSpec
from minisgl.core.plan import Masks, StepPlan, StepResult
from minisgl.distributed.collectives import TPGroup

T = TypeVar("T")


class Meeting:
    """Where the ranks put what they bring, and wait for each other."""

    def __init__(self, size: int) -> None:
        self.brought: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)


class ThreadCollectives:
    """Collectives between threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.meeting = meeting

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.meeting.brought[self.rank] = x
        self.meeting.barrier.wait()
        found = [y.clone() for y in self.meeting.brought]
        self.meeting.barrier.wait()
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        found = self._exchange(x)
        total = found[0].clone()
        for part in found[1:]:
            total += part
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x))

    def abort(self) -> None:
        self.meeting.barrier.abort()

    def close(self) -> None:
        pass


def thread_groups(size: int) -> list[TPGroup]:
    """A group of threads, as each rank sees it."""
    meeting, control = Meeting(size), Meeting(size)
    return [TPGroup(r, size, ThreadCollectives(r, meeting), ThreadCollectives(r, control)) for r in range(size)]


def on_all(size: int, work: Callable[[TPGroup], T]) -> list[T]:
    """What `work` returns on each rank."""

    def run(group: TPGroup) -> T:
        try:
            return work(group)
        except BaseException:
            group.collectives.abort()
            group.control.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, group) for group in thread_groups(size)]]


class ThreadGroup:
    """An executor over the ranks of a group of threads; every rank's tokens must be equal."""

    def __init__(self, config: Config, folder: Path, spec: ModelSpec, max_seq_len: int, size: int) -> None:
        self.ranks: list[LocalExecutor] = on_all(
            size, lambda group: build_local_executor(config, folder, spec, max_seq_len, group=group)
        )

    @property
    def num_pages(self) -> int:
        return self.ranks[0].num_pages

    def launch(self, plan: StepPlan) -> None:
        for rank in self.ranks:
            rank.launch(plan)

    def finish(self, masks: Masks) -> None:
        for rank in self.ranks:
            rank.finish(masks)

    def collect(self) -> StepResult:
        results = [rank.collect() for rank in self.ranks]
        for result in results[1:]:
            assert result.tokens.tolist() == results[0].tokens.tolist()
        return results[0]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
