"""Symmetric memory: buffers of a group at addresses that all know, which every GPU of the host can read and write.

torch's `torch.distributed._symmetric_memory` allocates them and exchanges the addresses. Sums of what lies in them take
one or two steps over NVLink instead of a ring's; NVLink multicast is not used.

Operations of a rank whose GPU reaches the others' memory: sums end in the kernel that also adds and norms.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisgl.core.ops import Operations
from minisgl.core.sampler import SamplingRows
from minisgl.distributed.collectives import Collectives, TPGroup
from minisgl.distributed.operations import embed_shard
from minisgl.distributed.shard import VocabShard
from minisgl.gpu.kernels.ranks import Ranks, flags_size
from minisgl.gpu.kernels.sharded_sampling import ShardedSampling, partial_words
from minisgl.gpu.kernels.sums import UNWRITTEN, Inboxes, inbox_size, one_shot_add_rms_norm, two_shot_add_rms_norm

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
    """Buffers where a rank puts its part of a sum. Consecutive sums take different ones (see `gpu/kernels/ranks.py`).

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


MAX_ROWS = 512
"""Tokens of a decode step that the fused sum and the sharded sampling have room for; beyond it is the plain ways."""


class FusedNorm:
    """Sum over the ranks, addition to the residual stream and norm in one launch.

    In two shots a rank's residual stream holds only the rows that it norms. So they are for forward passes that want
    all rows in the end, from the first norm to the last; and they do no harm after a pass was cut to the wanted rows.
    """

    def __init__(self, one_shot: Inboxes, two_shot: Inboxes, dtype: torch.dtype) -> None:
        self.one_shot = one_shot
        self.two_shot = two_shot
        self.dtype = dtype
        self.whole = False

    def begin(self, whole: bool) -> None:
        """A forward pass begins; `whole`: the hidden states of all its tokens are wanted."""
        self.whole = whole

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        """residual += the sum of every rank's x, and its norm; None when this is not for it."""
        rows = len(residual)
        if not rows or x.dtype != self.dtype:
            return None
        if rows <= self.one_shot.rows:
            out = torch.empty_like(residual)
            one_shot_add_rms_norm(self.one_shot, x, residual, weight, eps, out)
            return out
        if self.whole and rows <= self.two_shot.rows:
            out = torch.empty_like(residual)
            two_shot_add_rms_norm(self.two_shot, x, residual, weight, eps, out)
            return out
        return None


def make_norm(group: TPGroup, limits: Crossovers, hidden: int, dtype: torch.dtype, device: torch.device) -> FusedNorm:
    """The inboxes in which a group sums: 3 * size times the bytes up to which it takes one shot, and, for n rows of b
    bytes in two shots, 6 * n * b and the rounding up of n to a multiple of the size.
    """
    size, row = group.size, hidden * dtype.itemsize
    one_shot, two_shot = (min(MAX_ROWS, limit // row) for limit in (limits.one_shot, limits.two_shot))
    if two_shot <= one_shot:
        two_shot = 0

    def inboxes(rows: int, shapes: list[tuple[int, int]]) -> Inboxes:
        counts = [max(1, inbox_size(*shape, hidden)) for shape in shapes]  # there are no empty buffers
        buffers = [allocate(count, dtype, device, UNWRITTEN) for count in counts]
        return Inboxes(
            rank=group.rank,
            world=size,
            rows=rows,
            dim=hidden,
            own=tuple(buffer.own for buffer in buffers),
            addresses=tuple(buffer.addresses for buffer in buffers),
            turns=torch.zeros(rows, dtype=torch.int32, device=device),
        )

    return FusedNorm(
        inboxes(one_shot, [(one_shot, size)]), inboxes(two_shot, [(-(-two_shot // size), size), (two_shot, 1)]), dtype
    )


@dataclass(frozen=True)
class Fusion:
    """What a group does in kernels of its own."""

    norm: FusedNorm
    sampling: ShardedSampling


def make_fusion(group: TPGroup, collectives: SymmetricCollectives, hidden: int, shard: VocabShard) -> Fusion:
    """The kernels' memory: every rank calls this."""
    dtype, device = collectives.stages.dtype, collectives.stages.first.own.device
    flags = allocate(flags_size(group.size), torch.int32, device)
    ranks = Ranks(group.rank, group.size, flags.own, flags.addresses)
    return Fusion(make_norm(group, collectives.crossovers, hidden, dtype, device), make_sampling(ranks, shard, dtype))


def make_sampling(ranks: Ranks, shard: VocabShard, dtype: torch.dtype) -> ShardedSampling:
    """The memory in which a group samples."""
    device, width, size = ranks.epochs.device, shard.width, ranks.world
    logits = allocate(MAX_ROWS * width, dtype, device)
    partials = allocate(partial_words(MAX_ROWS, width), torch.int32, device)
    return ShardedSampling(
        ranks=ranks,
        vocab=shard.vocab,
        width=width,
        rows=MAX_ROWS,
        own_logits=logits.own.view(MAX_ROWS, width),
        own_partials=partials.own,
        logits=logits.addresses,
        partials=partials.addresses,
        gathered=torch.empty((MAX_ROWS, size * width), dtype=dtype, device=device),
    )


def staged_operations(
    ops: Operations, plain: Operations, shard: VocabShard, collectives: SymmetricCollectives, fusion: Fusion | None
) -> Operations:
    """`plain`, a rank's operations, with sums where their parts are made: in symmetric memory; `ops`: one device's."""
    stages = collectives.stages
    norm, sampling = (None, None) if fusion is None else (fusion.norm, fusion.sampling)

    def embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
        stages.begin()
        if norm is not None:
            norm.begin(whole)
        x = embed_shard(ids, table, shard)
        if not stages.fits(x):
            return collectives.all_reduce(x)
        stages.first.own[: x.numel()].view(x.shape).copy_(x)
        return collectives.in_stage(stages.first, x.shape)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = stages.take(len(x), len(weight))
        if out is None:
            return ops.linear(x, weight, bias)
        ops.linear_into(x, weight, bias, out)
        return out

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = None if norm is None else norm.add_rms_norm(x, residual, weight, eps)
        return plain.add_rms_norm(x, residual, weight, eps) if normed is None else normed

    def sample(
        logits: Tensor,
        table: SamplingRows,
        slots: Tensor,
        positions: Tensor,
        all_greedy: bool,
        any_filter: bool,
        any_min_len: bool,
    ) -> Tensor:
        rows = len(logits)
        if sampling is None or not 0 < rows <= sampling.rows:
            return plain.sample(logits, table, slots, positions, all_greedy, any_filter, any_min_len)
        sampling.own_logits[:rows].copy_(logits)
        return sampling.sample(rows, table, slots, positions)

    return dataclasses.replace(plain, embed=embed, project=project, add_rms_norm=add_rms_norm, sample=sample)
