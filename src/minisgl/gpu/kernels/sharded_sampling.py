"""Sampling when each GPU of a group has the logits of its own tokens: `sampling.py`'s two launches, one between them.

The first launch runs over a rank's own tokens. Then `_pull_kernel` brings together, on every rank, what the second one
reads: each rank's winners, maxima and masses, the winners' logits and, for rows with a filter alone, all logits. So
what crosses between the GPUs is a few hundred bytes a row, and the second launch, on the same numbers everywhere,
chooses the same token. What a row needs is decided on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.core.sampler import SamplingRows
from minisgl.gpu.kernels.filtering import LOWEST, STRAND
from minisgl.gpu.kernels.jit import jit, jit_varying
from minisgl.gpu.kernels.ranks import MAX_PROGRAMS, Ranks, meet, tensor_of
from minisgl.gpu.kernels.sampling import SPLIT, choose, row_kind, split_winners

ROWS = 8
"""Rows whose partials a program of the pull takes at a time."""
COPY_BLOCK = 8192
COPIERS = 16
"""Programs that share the copying of a row's logits from one rank: a copy over NVLink waits more than it moves."""


@jit_varying("slots", "rows")
def _pull_kernel(
    shards: tl.tensor, partials: tl.tensor, flags: tl.tensor, epochs: tl.tensor, slots: tl.tensor,
    parameters: tl.tensor, logits: tl.tensor, winners: tl.tensor, maxima: tl.tensor, masses: tl.tensor,
    strand_maxima: tl.tensor, rows: tl.tensor, capacity: tl.tensor, vocab: tl.tensor, width: tl.tensor,
    splits: tl.tensor, strands: tl.tensor,
    RANK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr, LINE: tl.constexpr,
    ROWS: tl.constexpr, COPIERS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    meet(flags, epochs, program, RANK, WORLD, PEERS, LINE)
    size = capacity.to(tl.int64) * splits  # of winners, maxima and masses, which lie one behind the other
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
                    there, here = 3 * size + index * strands, (index * WORLD + peer) * strands
                    _copy(floats + there, strand_maxima + here, strands, copier, COPIERS, BLOCK)
                    here = (index * WORLD + peer) * width
                    _copy(shard + index * width, logits + here, width, copier, COPIERS, BLOCK)


@jit
def _copy(
    source: tl.tensor, target: tl.tensor, length: tl.tensor, copier: tl.tensor, COPIERS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    for start in range(copier * BLOCK, length, COPIERS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        within = index < length
        tl.store(target + index, tl.load(source + index, mask=within, cache_modifier=".cg"), mask=within)


def split_for(width: int) -> int:
    """Tokens that a program of the first launch takes: the largest power of two that divides a shard, up to SPLIT."""
    return min(SPLIT, width & -width)


def partial_words(rows: int, width: int) -> int:
    """32-bit words of one rank's partials for so many rows."""
    return rows * (3 * (width // split_for(width)) + width // STRAND)


@dataclass(frozen=True)
class ShardedSampling:
    """The memory that a group samples in, for up to `rows` rows: this rank's, and where the others' is.

    `own_logits` (rows, width) and `own_partials` int32 (partial_words,) are read by the others, whose addresses, int64
    (WORLD,), are `logits` and `partials`. `gathered` (rows, WORLD * width) is this rank's alone.
    """

    ranks: Ranks
    vocab: int
    width: int
    rows: int
    own_logits: Tensor
    own_partials: Tensor
    logits: Tensor
    partials: Tensor
    gathered: Tensor

    def sample(self, count: int, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
        """`sampling.sample` of the first `count` rows of every rank's `own_logits` -> int32 (count,), on all alike."""
        world, width, device = self.ranks.world, self.width, self.own_logits.device
        split = split_for(width)
        splits, strands = width // split, width // STRAND
        size = self.rows * splits
        winners, rest = self.own_partials[:size].view(self.rows, splits), self.own_partials[size:].view(torch.float32)
        maxima, masses = rest[: 2 * size].view(2, self.rows, splits)
        origin = self.ranks.rank * width
        split_winners(
            self.own_logits[:count], table, slots, positions, (winners, maxima, masses, rest[2 * size :]),
            vocab=self.vocab, origin=origin, split=split,
        )  # fmt: skip
        found = torch.empty((count, world * splits), dtype=torch.int32, device=device)
        tops, shares = torch.empty((2, count, world * splits), dtype=torch.float32, device=device)
        strand_maxima = torch.empty((count, world * strands), dtype=torch.float32, device=device)
        parameters = (table.temperature, table.top_p, table.min_p, table.top_k)
        _pull_kernel[(min(triton.cdiv(count, ROWS) * world * COPIERS, MAX_PROGRAMS),)](
            self.logits, self.partials, self.ranks.flags, self.ranks.epochs, slots, parameters, self.gathered, found,
            tops, shares, strand_maxima, count, self.rows, self.vocab, width, splits, strands,
            ROWS=ROWS, COPIERS=COPIERS, BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK=COPY_BLOCK,
            num_warps=8, **self.ranks.constants,
        )  # fmt: skip
        return choose(
            self.gathered[:count], table, slots, positions, (found, tops, shares, strand_maxima), vocab=self.vocab
        )
