"""Sampling when each GPU of a group has the logits of its own tokens: `sampling.py`'s two launches, one between them.

The first launch runs over a rank's own tokens. Then `_pull_kernel` copies to every rank what the second launch reads:
each rank's winners, maxima and masses, the winners' logits and, only for rows with a filter, all logits. So the second
launch, on the same numbers everywhere, chooses the same token. Twin: `core.sampler.sample`.

Ranks read each other's symmetric memory (see `all_reduce.py`) after a barrier. Nothing signals the end of reading. So a
tensor that others read must not be written again before the next kernel with a barrier has ended, which lets a rank
pass only when all ranks have ended this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.sampler import SamplingRows
from minisgl.gpu.kernels.all_reduce import MAX_BLOCKS, tensor_of
from minisgl.gpu.kernels.jit import cdiv, jit, jit_varying, next_power_of_2
from minisgl.gpu.kernels.sampling import LOWEST, SEGMENT, SPLIT, choose, empty_partial, row_kind, split_winners

LINE = 32  # int32 flags between two slots of the barrier: a cache line, so that waiting in one does not slow the others
ROWS = 8  # rows whose partials a thread block of the pull takes at a time
COPY_BLOCK = 8192
COPIERS = 16  # thread blocks that share the copying of a row's logits from one rank: over NVLink latency dominates


def flags_size(world: int) -> int:
    """int32 flags that each rank needs, zero at the start."""
    assert world <= LINE
    return MAX_BLOCKS * LINE


@jit
def barrier(
    flags: tensor, epochs: tensor, slot: tensor, RANK: constexpr, WORLD: constexpr, PEERS: constexpr, LINE: constexpr
) -> None:
    # Wait until the thread blocks with this slot have arrived on every rank; what they wrote before is then visible.
    # flags: addresses of every rank's int32 (slots, LINE), of which WORLD are used; epochs int32 (slots,): this rank's
    # arrivals in each slot, which may wrap around.
    epoch = tl.load(epochs + slot) + 1
    tl.debug_barrier()  # every thread has written what it had to write, and has read the epoch
    peer = tl.arange(0, PEERS)
    exists = peer < WORLD
    peer_flags = tl.load(flags + peer, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    arrival = tl.full((PEERS,), 0, tl.int32) + epoch
    tl.atomic_xchg(peer_flags + slot * LINE + RANK, arrival, mask=exists, sem="release", scope="sys")
    own_flags = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + slot * LINE + peer
    zero = tl.full((PEERS,), 0, tl.int32)
    behind = 1
    while behind > 0:  # a number, as Triton 3.6 cannot compile a loop that carries the tensor
        seen = tl.atomic_add(own_flags, zero, mask=exists, sem="acquire", scope="sys")
        behind = tl.max(tl.where(exists, epoch - seen, 0), axis=0)
    tl.store(epochs + slot, epoch)
    tl.debug_barrier()


class Barrier:
    """A rank's flags for `barrier`, one set for all kernels of a group.

    `own`: this rank's zeroed int32 (flags_size(world),); `flags`: the addresses of every rank's, int64 (WORLD,).
    """

    def __init__(self, rank: int, world: int, own: Tensor, flags: Tensor) -> None:
        self.rank, self.world, self.flags = rank, world, flags
        self.own = own  # only its address is used, by all ranks: it must live as long as they
        self.epochs = torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=own.device)
        self.constants = {"RANK": rank, "WORLD": world, "PEERS": next_power_of_2(world), "LINE": LINE}


@jit_varying("slots", "rows")
def _pull_kernel(
    shards: tensor, partials: tensor, flags: tensor, epochs: tensor, slots: tensor, parameters: tensor, logits: tensor,
    winners: tensor, maxima: tensor, masses: tensor, segment_maxima: tensor, rows: tensor, capacity: tensor,
    vocab: tensor, width: tensor, splits: tensor, segments: tensor, RANK: constexpr, WORLD: constexpr, PEERS: constexpr,
    LINE: constexpr, ROWS: constexpr, COPIERS: constexpr, BLOCK_SPLITS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    barrier(flags, epochs, program, RANK, WORLD, PEERS, LINE)
    size = capacity.to(tl.int64) * splits  # of winners, maxima and masses, which lie one after the other
    groups = tl.cdiv(rows, ROWS)
    for job in range(program, groups * WORLD * COPIERS, tl.num_programs(0)):
        copier, peer = job // WORLD % COPIERS, job % WORLD
        first = job // (WORLD * COPIERS) * ROWS
        shard = tensor_of(shards, peer, logits.dtype.element_ty)
        ints = tensor_of(partials, peer, tl.int32)
        floats = tensor_of(partials, peer, tl.float32)
        if copier == 0:
            row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)  # (ROWS, 1)
            split = tl.arange(0, BLOCK_SPLITS)[None, :]
            exists = (row < rows) & (split < splits)
            there, here = row * splits + split, (row * WORLD + peer) * splits + split
            winner = tl.load(ints + there, mask=exists, other=0, cache_modifier=".cg")
            top = tl.load(floats + size + there, mask=exists, other=float("-inf"), cache_modifier=".cg")
            mass = tl.load(floats + 2 * size + there, mask=exists, other=0.0, cache_modifier=".cg")
            live = exists & (top > LOWEST)
            x = tl.load(shard + row * width + winner - peer * width, mask=live, other=0.0, cache_modifier=".cg")
            tl.store(winners + here, winner, mask=exists)
            tl.store(maxima + here, top, mask=exists)
            tl.store(masses + here, mass, mask=exists)
            tl.store(logits + row * WORLD * width + winner, x, mask=live)
        rows_here = first + tl.arange(0, ROWS)
        slots_here = tl.load(slots + rows_here, mask=rows_here < rows, other=0).to(tl.int64)
        kinds = row_kind(parameters, slots_here, vocab)
        if tl.max((kinds[1] & (rows_here < rows)).to(tl.int32), axis=0) > 0:
            for index in range(first, tl.minimum(first + ROWS, rows)):
                kind = row_kind(parameters, tl.load(slots + index).to(tl.int64), vocab)
                if kind[1]:
                    there, here = 3 * size + index * segments, (index * WORLD + peer) * segments
                    _copy(floats + there, segment_maxima + here, segments, copier, COPIERS, BLOCK)
                    here = (index * WORLD + peer) * width
                    _copy(shard + index * width, logits + here, width, copier, COPIERS, BLOCK)


@jit
def _copy(source: tensor, target: tensor, length: tensor, copier: tensor, COPIERS: constexpr, BLOCK: constexpr) -> None:
    for start in range(copier * BLOCK, length, COPIERS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        within = index < length
        tl.store(target + index, tl.load(source + index, mask=within, cache_modifier=".cg"), mask=within)


def split_for(width: int) -> int:
    """Tokens per thread block of the first launch: the largest power of two that divides a shard, up to SPLIT."""
    return min(SPLIT, width & -width)


def partial_words(rows: int, width: int) -> int:
    """32-bit words of one rank's partials for so many rows."""
    return rows * (3 * (width // split_for(width)) + width // SEGMENT)


@dataclass(frozen=True)
class ShardedSampling:
    """A rank's memory for sampling up to `rows` rows, and the addresses of the others'.

    The other ranks read `own_logits` (rows, width) and `own_partials` int32 (partial_words,); `logits` and `partials`,
    int64 (WORLD,), are the addresses on every rank. `gathered` (rows, WORLD * width) is this rank's alone.
    """

    barrier: Barrier
    vocab: int
    width: int
    rows: int
    own_logits: Tensor
    own_partials: Tensor
    logits: Tensor
    partials: Tensor
    gathered: Tensor

    def sample(self, count: int, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
        """`sampling.sample` of the first `count` rows of all ranks' `own_logits` -> int32 (count,), equal on all."""
        world, width, split = self.barrier.world, self.width, split_for(self.width)
        splits, segments = width // split, width // SEGMENT
        size = self.rows * splits
        winners, rest = self.own_partials[:size].view(self.rows, splits), self.own_partials[size:].view(torch.float32)
        partial = (winners, *rest[: 2 * size].view(2, self.rows, splits), rest[2 * size :])
        logits = self.own_logits[:count]
        split_winners(logits, table, slots, positions, partial, self.vocab, split, self.barrier.rank * width)
        gathered = empty_partial(count, world * splits, segments // splits, logits.device)
        parameters = (table.temperature, table.top_p, table.min_p, table.top_k)
        _pull_kernel[(min(cdiv(count, ROWS) * world * COPIERS, MAX_BLOCKS),)](
            self.logits, self.partials, self.barrier.flags, self.barrier.epochs, slots, parameters, self.gathered,
            *gathered, count, self.rows, self.vocab, width, splits, segments, ROWS=ROWS, COPIERS=COPIERS,
            BLOCK_SPLITS=next_power_of_2(splits), BLOCK=COPY_BLOCK, num_warps=8, **self.barrier.constants,
        )  # fmt: skip
        return choose(self.gathered[:count], table, slots, positions, gathered, self.vocab)
