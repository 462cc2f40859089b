"""Symmetric memory: buffers of a group at addresses that all know, which every GPU of the host can read and write.

torch's `torch.distributed._symmetric_memory` allocates them and exchanges the addresses. Sums of what lies in them take
one or two steps over NVLink instead of a ring's; NVLink multicast is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisgl.parallel.group import Collectives

KIB = 2**10


@dataclass(frozen=True)
class Crossovers:
    """Up to how many bytes of a sum each way is taken; beyond both, NCCL's.

    In one shot every rank has all of every other's, in two each has its share of them and passes the sum on.
    """

    one_shot: int
    two_shot: int


def crossovers(text: str, size: int) -> Crossovers:
    """What `--all-reduce-crossovers` asks for; "auto" is what was measured on H200s (docs/distributed.md)."""
    if text == "auto":
        return Crossovers((2048 if size == 2 else 512) * KIB, 16384 * KIB)
    one_shot, two_shot = (int(part) * KIB for part in text.split(","))
    return Crossovers(one_shot, two_shot)


@dataclass(frozen=True)
class Buffer:
    """This rank's tensor, and where every rank's is: int64 (size,) on the device."""

    own: Tensor
    addresses: Tensor


def allocate(count: int, dtype: torch.dtype, device: torch.device, fill: float = 0.0) -> Buffer:
    """A buffer of `count` elements, each `fill`, on every rank; every rank calls it with the same."""
    from torch.distributed import _symmetric_memory as symmetric

    own: Tensor = symmetric.empty(count, dtype=dtype, device=device)
    own.fill_(fill)
    torch.cuda.synchronize(device)  # nobody reaches it before it is filled
    assert dist.group.WORLD is not None
    handle: Any = symmetric.rendezvous(own, dist.group.WORLD.group_name)
    within = own.data_ptr() - handle.buffer_ptrs[handle.rank]  # of what was allocated together, alike on every rank
    addresses = [address + within for address in handle.buffer_ptrs]
    return Buffer(own, torch.tensor(addresses, dtype=torch.int64, device=device))


class Stages:
    """Buffers where a rank puts its part of a sum. Consecutive sums take different ones (see `ops/kernels/ranks.py`).

    A forward pass begins in the first one, which nothing else takes: what is summed there may become the residual
    stream. Products that end a block take turns on two; what was computed elsewhere is copied to the last.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for sums of `size` bytes."""
        self.dtype = dtype
        self.bytes = size
        count = size // dtype.itemsize
        self.first, self.left, self.right, self.loose = (allocate(count, dtype, device) for _ in range(4))
        self._next = self.left

    def fits(self, x: Tensor) -> bool:
        """Whether x may be summed here."""
        return x.dtype == self.dtype and 0 < x.numel() * x.element_size() <= self.bytes

    def begin(self) -> None:
        """A forward pass begins."""
        self._next = self.left

    def take(self, rows: int, columns: int) -> Tensor | None:
        """Where the next product (rows, columns) may be written; None when it is too large."""
        if not 0 < rows * columns * self.dtype.itemsize <= self.bytes:
            return None
        buffer, self._next = self._next, self.right if self._next is self.left else self.left
        return buffer.own[: rows * columns].view(rows, columns)

    def holding(self, x: Tensor) -> Buffer:
        """The buffer that x fills from its beginning; x is copied to one when it lies elsewhere."""
        for buffer in (self.first, self.left, self.right):
            if x.data_ptr() == buffer.own.data_ptr():
                return buffer
        self.loose.own[: x.numel()].view(x.shape).copy_(x)
        return self.loose


class SymmetricCollectives:
    """Sums through symmetric memory up to the crossovers, everything else through `base`."""

    def __init__(self, base: Collectives, stages: Stages, crossovers: Crossovers) -> None:
        assert dist.group.WORLD is not None
        self.base = base
        self.stages = stages
        self.crossovers = crossovers
        self.name = dist.group.WORLD.group_name

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in its stage or in a new tensor."""
        if not self.stages.fits(x) or x.nbytes > self.crossovers.two_shot:
            return self.base.all_reduce(x)
        return self.in_stage(self.stages.holding(x), x.shape)

    def in_stage(self, buffer: Buffer, shape: torch.Size) -> Tensor:
        """The sum of what lies at the beginning of every rank's buffer."""
        part = buffer.own[: shape.numel()].view(shape)
        if part.nbytes <= self.crossovers.one_shot:
            total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self.name)
            return total
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self.name)
        return part

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x."""
        return self.base.all_gather(x)

    def abort(self) -> None:
        """Let go of what waits."""
        self.base.abort()

    def close(self) -> None:
        """Leave the group."""
        self.base.close()
