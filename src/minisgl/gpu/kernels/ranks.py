"""How kernels of a group's GPUs reach each other's memory (symmetric memory), and meet in it before they read it.

Every rank launches the same kernel with the same grid. Rank r's tensors are known to all by their addresses, int64
(WORLD,), in the order of ranks. Ranks wait for each other program by program, so that all programs of a grid must run
at once, at most MAX_PROGRAMS of them. `meet` waits for all that the others wrote before; sums, whose data are their own
flags, do without (`sums.py`).

Nobody says when it is done reading. So a tensor that others read must not be written again before the next kernel that
waits for every rank has ended, which only lets a rank pass when all have ended this one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.jit import jit

MAX_PROGRAMS = 128
LINE = 32
"""int32 flags from one slot to the next, a cache line, so that who waits in one does not hold up the others'."""


def flags_size(world: int) -> int:
    """int32 flags that each rank needs, zero at the start."""
    assert world <= LINE
    return MAX_PROGRAMS * LINE


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


class Ranks:
    """Who this is among the ranks, and the flags by which they meet: the same for every kernel of a group."""

    def __init__(self, rank: int, world: int, own: Tensor, flags: Tensor) -> None:
        """`own`: this rank's zeroed int32 (flags_size(world),); `flags`: the addresses of every rank's, int64."""
        self.rank = rank
        self.world = world
        self.own = own  # only its address is used, by all ranks: it must live as long as they do
        self.flags = flags
        self.epochs = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=own.device)
        self.constants = {"RANK": rank, "WORLD": world, "PEERS": triton.next_power_of_2(world), "LINE": LINE}
