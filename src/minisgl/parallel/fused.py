"""Operations of a rank whose GPU reaches the others' memory: sums end in the kernel that also adds and norms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.ops.kernels.ranks import Ranks, flags_size
from minisgl.ops.kernels.sharded_sampling import ShardedSampling, partial_words
from minisgl.ops.kernels.sums import UNWRITTEN, Inboxes, inbox_size, one_shot_add_rms_norm, two_shot_add_rms_norm
from minisgl.ops.operations import Operations
from minisgl.ops.sampling import SamplingRows
from minisgl.parallel.group import TPGroup
from minisgl.parallel.operations import embed_shard
from minisgl.parallel.shard import VocabShard
from minisgl.parallel.symmetric import Crossovers, SymmetricCollectives, allocate

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
