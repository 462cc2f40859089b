"""A rank of a tensor-parallel group and what it can do together with the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Collectives(Protocol):
    """What all ranks do together, each calling the same in the same order. Captured in a CUDA graph on a GPU."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on each; x may be overwritten, and may be what is returned."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in the order of ranks -> (size, *x.shape). x is contiguous."""

    def abort(self) -> None:
        """Let go of whatever waits for a rank that is gone. The group is of no use afterwards."""

    def close(self) -> None:
        """Release what is held; every rank is still there."""


@dataclass(frozen=True)
class TPGroup:
    """Which rank this process is, of how many, and the collectives between them.

    `collectives` work on the device's tensors, `control` on the CPU's, while the ranks start. `one_host`: all ranks are
    processes of one host.
    """

    rank: int
    size: int
    collectives: Collectives
    control: Collectives
    one_host: bool = True

    def least(self, number: int) -> int:
        """The least of the ranks' numbers; none gets it before all have said theirs."""
        return int(self.control.all_gather(torch.tensor([number], dtype=torch.int64)).min())
