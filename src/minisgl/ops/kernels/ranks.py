"""What the GPUs of a group do together by reading and writing each other's memory (symmetric memory), in one launch.

Every rank launches the same kernel with the same grid. Rank r's tensors are known to all by their addresses, int64
(WORLD,), in the order of ranks. `meet` is the only way in which ranks wait for each other: program by program, so that
all programs of a grid must run at once, at most MAX_PROGRAMS of them.

Nobody says when it is done reading. So a tensor that others read must not be written again before the next kernel that
meets has ended, which only lets a rank pass when all have ended this one: consecutive sums use different tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.ops.kernels.jit import jit, jit_varying, launch_options, warps_for
from minisgl.ops.kernels.pdl import after_previous

MAX_PROGRAMS = 128
LINE = 32
"""int32 flags from one slot to the next, a cache line, so that who waits in one does not hold up the others'."""
PHASES = 4
"""Groups of flags, for kernels that meet more than once and kernels that follow each other."""
ONE_SHOT, TWO_SHOT, TWO_SHOT_END, PULL = range(PHASES)


def flags_size(world: int) -> int:
    """int32 flags that each rank needs, zero at the start."""
    assert world <= LINE
    return PHASES * MAX_PROGRAMS * LINE


@jit
def meet(
    flags: tl.tensor, epochs: tl.tensor, slot: tl.tensor, RANK: tl.constexpr, WORLD: tl.constexpr,
    PEERS: tl.constexpr, LINE: tl.constexpr,
) -> None:  # fmt: skip
    """Wait until the programs with this slot of every rank have come here, and see what they wrote before.

    flags: addresses of every rank's int32 (slots, LINE), of which WORLD are used; epochs int32 (slots,): how often this
    rank met in each slot, whose wrapping around does no harm.
    """
    epoch = tl.load(epochs + slot) + 1
    tl.debug_barrier()  # all of the program has written what it had to write, and has read the epoch
    peer = tl.arange(0, PEERS)
    exists = peer < WORLD
    theirs = tl.load(flags + peer, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    arrival = tl.full((PEERS,), 0, tl.int32) + epoch
    tl.atomic_xchg(theirs + slot * LINE + RANK, arrival, mask=exists, sem="release", scope="sys")
    mine = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + slot * LINE + peer
    zero = tl.full((PEERS,), 0, tl.int32)
    behind = 1
    while behind > 0:  # a number, as Triton 3.6 cannot compile a loop that carries the tensor
        seen = tl.atomic_add(mine, zero, mask=exists, sem="acquire", scope="sys")
        behind = tl.max(tl.where(exists, epoch - seen, 0), axis=0)
    tl.store(epochs + slot, epoch)
    tl.debug_barrier()


@jit
def tensor_of(addresses: tl.tensor, peer: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A rank's tensor. It starts at a multiple of 16 bytes: did the compiler not know, elements would go one by one."""
    return tl.multiple_of(tl.load(addresses + peer).to(tl.pointer_type(DTYPE)), 16)


@jit
def _summed(
    parts: tl.tensor, place: tl.tensor, mask: tl.tensor, out: tl.tensor, WORLD: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The sum over ranks of a row's parts, in the order of ranks, in float32 and rounded once."""
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(WORLD):
        base = tensor_of(parts, peer, out.dtype.element_ty)
        total += tl.load(base + place, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return total.to(out.dtype.element_ty)


@jit
def _added_and_normed(
    x: tl.tensor, stream: tl.tensor, gain: tl.tensor, mask: tl.tensor, dim: tl.tensor, eps: tl.tensor
) -> tl.tensor:
    """Add x to a row of the residual stream in place; the norm of the sum, rounded as `reference.rms_norm` does."""
    stored = (x.to(tl.float32) + tl.load(stream, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
    tl.store(stream, stored, mask=mask)
    wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.where(mask, wide * wide, 0.0), axis=0) / dim + eps)
    return ((wide * scale).to(x.dtype).to(tl.float32) * gain).to(x.dtype)


@jit_varying("rows")
def _one_shot_kernel(
    parts: tl.tensor, flags: tl.tensor, epochs: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor,
    rows: tl.tensor, dim: tl.tensor, eps: tl.tensor,
    SLOT: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr, LINE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < dim
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    after_previous(PDL)
    meet(flags, epochs, SLOT + program, RANK, WORLD, PEERS, LINE)
    for row in range(program, rows, tl.num_programs(0)):
        place = row * dim + column
        x = _summed(parts, place, mask, out, WORLD, BLOCK)
        tl.store(out + place, _added_and_normed(x, residual + place, gain, mask, dim, eps), mask=mask)


@jit_varying("rows")
def _two_shot_kernel(
    parts: tl.tensor, outs: tl.tensor, flags: tl.tensor, epochs: tl.tensor, residual: tl.tensor, weight: tl.tensor,
    rows: tl.tensor, dim: tl.tensor, eps: tl.tensor,
    SLOT: tl.constexpr, END: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, PEERS: tl.constexpr,
    LINE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < dim
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    share = (rows + WORLD - 1) // WORLD
    first = RANK * share
    meet(flags, epochs, SLOT + program, RANK, WORLD, PEERS, LINE)
    for row in range(first + program, tl.minimum(first + share, rows), tl.num_programs(0)):
        place = row * dim + column
        x = _summed(parts, place, mask, residual, WORLD, BLOCK)
        normed = _added_and_normed(x, residual + place, gain, mask, dim, eps)
        for peer in tl.static_range(WORLD):
            tl.store(tensor_of(outs, peer, residual.dtype.element_ty) + place, normed, mask=mask)
    meet(flags, epochs, END + program, RANK, WORLD, PEERS, LINE)


class Ranks:
    """Who this is among the ranks, and the flags by which they meet: the same for every kernel of a group."""

    def __init__(self, rank: int, world: int, own: Tensor, flags: Tensor) -> None:
        """`own`: this rank's zeroed int32 (flags_size(world),); `flags`: the addresses of every rank's, int64."""
        self.rank = rank
        self.world = world
        self.own = own  # only its address is used, by all ranks: it must live as long as they do
        self.flags = flags
        self.epochs = torch.zeros(PHASES * MAX_PROGRAMS, dtype=torch.int32, device=own.device)
        self.constants = {"RANK": rank, "WORLD": world, "PEERS": triton.next_power_of_2(world), "LINE": LINE}


def slot(phase: int) -> int:
    """The first of a phase's slots."""
    return phase * MAX_PROGRAMS


def one_shot_add_rms_norm(
    ranks: Ranks, parts: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    """residual += the sum of every rank's part, and its norm into `out`: every rank does all of it.

    parts: the addresses of every rank's (T, D), contiguous and of the residual's dtype; residual, out (T, D); weight
    (D,).
    """
    rows, dim = residual.shape
    pdl = launch_options()
    block = triton.next_power_of_2(dim)
    _one_shot_kernel[(min(rows, MAX_PROGRAMS),)](
        parts, ranks.flags, ranks.epochs, residual, weight, out, rows, dim, eps,
        SLOT=slot(ONE_SHOT), BLOCK=block, PDL=bool(pdl), num_warps=warps_for(block),
        **ranks.constants, **pdl,
    )  # fmt: skip


def two_shot_add_rms_norm(
    ranks: Ranks, parts: Tensor, residual: Tensor, weight: Tensor, eps: float, outs: Tensor
) -> None:
    """The same, where each rank does its share of the rows and writes their norms into every rank's out.

    The first ceil(T / WORLD) rows are rank 0's, and so on; a rank's residual holds only its own rows from then on.
    outs: the addresses of every rank's (T, D).
    """
    rows, dim = residual.shape
    pdl = launch_options()
    block = triton.next_power_of_2(dim)
    share = triton.cdiv(rows, ranks.world)
    _two_shot_kernel[(min(share, MAX_PROGRAMS),)](
        parts, outs, ranks.flags, ranks.epochs, residual, weight, rows, dim, eps,
        SLOT=slot(TWO_SHOT), END=slot(TWO_SHOT_END), BLOCK=block, PDL=bool(pdl), num_warps=warps_for(block),
        **ranks.constants, **pdl,
    )  # fmt: skip
