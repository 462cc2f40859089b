"""Fused all-reduce + residual add + RMS norm over the GPUs of a group, in one launch, without flags or fences.
Twins: an all-reduce followed by `core.ops.add_rms_norm`.

GPUs reach each other's memory through symmetric memory. Each rank launches the same kernel with the same grid. Rank
r's tensors are known to all by their addresses, int64 (WORLD,), in the order of ranks. Ranks wait for each other thread
block by thread block, so all thread blocks of a grid must run at once: at most MAX_BLOCKS.

Ranks write rows into each other's receive buffers and poll their own. A word that has not arrived holds a sentinel, the
bits of -0.0, and -0.0 is sent as +0.0: the data are their own flags (an idea of Lamport's; in NCCL's LL protocol a flag
goes with each word). A row is complete once none of its words is the sentinel, in whatever order they arrived.

A receive buffer holds each row in three generations, all of sentinels at the start, and each rank keeps the row's
current generation g, 0 at the start. A call on some rows does for each of them, and for no other row, on every rank:

1. it writes what it sends to generation g of other ranks' buffers;
2. it resets generation g + 2 (mod 3) of its own buffers, which it read in the previous call, to the sentinel;
3. it reads generation g of its own buffers until all words of this call are there;
4. it sets g to g + 1 (mod 3).

All ranks make the same calls in the same order, so g is the same on all in a row's k-th call. Then rank A finds in step
3 only sentinels and words of call k, for every rank B that writes to it:

- The words of call k - 3, which were there before, A read in that call and reset in its call k - 2.
- B writes in its call k, after its call k - 1 had ended. There it read what A sent in A's call k - 1, since every rank
  that writes to another in a call also reads from it: all from all with one shot; a row's owner and every other rank
  with two. And A's call k - 1 began when A's call k - 2, with the reset, had ended.
- A resets the generation again in its call k + 1, after its call k has read all that B wrote.

Calls of a rank do not overlap: what one wrote to its own memory is visible when the next has passed `after_previous`.
A row belongs to the same thread block on every rank, and only this block touches the row's generation. It sends all
that needs no waiting before it waits, and waits only for the same block of other ranks, which runs at once: so it ends.
Weak stores are enough, as each word is written whole and marks its own arrival; a barrier after them keeps the compiler
from moving them past a polling loop. Polls are volatile loads: each reads memory anew, at system scope.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.gpu.kernels.jit import Kernel, after_previous, jit, jit_varying, launch_options, next_power_of_2, warps_for

MAX_BLOCKS = 128
GENERATIONS = 3
UNWRITTEN = -0.0  # every element of a receive buffer at the start


@jit
def tensor_of(addresses: tensor, peer: tensor, DTYPE: constexpr) -> tensor:
    """A rank's tensor. It is aligned to 16 bytes; unless the compiler knows that, it moves elements one by one."""
    return tl.multiple_of(tl.load(addresses + peer).to(tl.pointer_type(DTYPE)), 16)


def buffer_size(rows: int, senders: int, dim: int) -> int:
    """Elements of a receive buffer (GENERATIONS, rows, senders, dim)."""
    return GENERATIONS * rows * senders * dim


@dataclass(frozen=True)
class ReceiveBuffers:
    """The receive buffers of one kernel, for up to `rows` rows of `dim` elements of one dtype.

    `own` is this rank's memory, which must live as long as any rank: for one shot a buffer of
    `buffer_size(rows, WORLD, dim)`; for two shots one of `buffer_size(ceil(rows / WORLD), WORLD, dim)` for partial sums
    of the rows that it owns, and one of `buffer_size(rows, 1, dim)` for the norms of the others' rows. `addresses` has
    for each buffer, in int64 (WORLD,), its address on every rank. generations: g of each row, int32 (rows,), zero at
    the start, on this rank alone.
    """

    rank: int
    world: int
    rows: int
    dim: int
    own: tuple[Tensor, ...]
    addresses: tuple[Tensor, ...]
    generations: Tensor


@jit
def _row_words(
    buffers: tensor, rank: tensor, generation: tensor, row: tensor, capacity: tensor, SENDERS: constexpr,
    DIM: constexpr, WORD: constexpr,
) -> tensor:  # fmt: skip
    """The address of the first sender's words of a row; the other senders' follow."""
    return tensor_of(buffers, rank, WORD) + (generation * capacity + row) * SENDERS * DIM


@jit
def _words(x: tensor, WORD: constexpr, SENTINEL: constexpr) -> tensor:
    """The bits of x as they are sent, with +0.0 for -0.0."""
    bits = x.to(WORD, bitcast=True)
    return tl.where(bits == SENTINEL, 0, bits).to(WORD)


@jit
def _reset(
    place: tensor, mask: tensor, RANK: constexpr, SENDERS: constexpr, DIM: constexpr, WORD: constexpr,
    SENTINEL: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    # Overwrite what the other senders wrote with sentinels.
    for sender in tl.static_range(SENDERS):
        if sender != RANK:
            tl.store(place + sender * DIM, tl.full((BLOCK,), SENTINEL, WORD), mask=mask)


@jit
def _advance(generations: tensor, row: tensor, generation: tensor) -> None:
    tl.debug_barrier()  # every thread has read the generation
    tl.store(generations + row, (generation + 1) % 3)


@jit
def _arrived(
    own: tensor, place: tensor, mask: tensor, RANK: constexpr, SENDERS: constexpr, DIM: constexpr, SENTINEL: constexpr,
    DTYPE: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    # The float32 sum of this rank's words and the others', in the order of ranks, and the least of the others' words.
    # The sum is complete once the least is not the sentinel, which is the least integer there is.
    least = own
    total = tl.zeros((BLOCK,), tl.float32)
    for sender in tl.static_range(SENDERS):
        words = own
        if sender != RANK:
            words = tl.load(place + sender * DIM, mask=mask, other=0, volatile=True)
            least = tl.minimum(least, words)
        total += words.to(DTYPE, bitcast=True).to(tl.float32)
    return total, tl.min(least.to(tl.int32), axis=0)


@jit
def _reduce_row(
    part: tensor, buffers: tensor, results: tensor, generations: tensor, residual: tensor, gain: tensor, out: tensor,
    row: tensor, slot: tensor, slots: tensor, capacity: tensor, eps: tensor, RANK: constexpr, WORLD: constexpr,
    DIM: constexpr, WORD: constexpr, SENTINEL: constexpr, BLOCK: constexpr, SEND: constexpr,
) -> None:  # fmt: skip
    # Add a row, which arrives in `slot` of this rank's buffer, to the residual stream and norm it with the roundings
    # of `core.ops.add_rms_norm`. SEND: write the norm to the other ranks too.
    column = tl.arange(0, BLOCK)
    mask, place = column < DIM, row * DIM + column
    DTYPE: tl.constexpr = out.dtype.element_ty
    generation = tl.load(generations + row)
    own = _words(tl.load(part + place, mask=mask, other=0.0), WORD, SENTINEL)
    before = tl.load(residual + place, mask=mask, other=0.0)
    stale = _row_words(buffers, RANK, (generation + 2) % 3, slot, slots, WORLD, DIM, WORD) + column
    _reset(stale, mask, RANK, WORLD, DIM, WORD, SENTINEL, BLOCK)
    here = _row_words(buffers, RANK, generation, slot, slots, WORLD, DIM, WORD) + column
    least = SENTINEL
    while least == SENTINEL:  # a number, as Triton 3.6 cannot compile a loop that carries a tensor
        total, least = _arrived(own, here, mask, RANK, WORLD, DIM, SENTINEL, DTYPE, BLOCK)
        if least != SENTINEL:
            stored = (total.to(DTYPE).to(tl.float32) + before.to(tl.float32)).to(DTYPE)
            tl.store(residual + place, stored, mask=mask)
            wide = stored.to(tl.float32)
            scale = tl.rsqrt(tl.sum(tl.where(mask, wide * wide, 0.0), axis=0) / DIM + eps)
            normed = ((wide * scale).to(DTYPE).to(tl.float32) * gain.to(tl.float32)).to(DTYPE)
            words = _words(normed, WORD, SENTINEL)
            if SEND:
                for peer in tl.static_range(WORLD):
                    if peer != RANK:
                        there = _row_words(results, peer, generation, row, capacity, 1, DIM, WORD)
                        tl.store(there + column, words, mask=mask)
            tl.store(out + place, words.to(DTYPE, bitcast=True), mask=mask)
    _advance(generations, row, generation)


@jit_varying("rows", "capacity")
def _one_shot_kernel(
    part: tensor, buffers: tensor, generations: tensor, residual: tensor, weight: tensor, out: tensor, rows: tensor,
    capacity: tensor, eps: tensor, RANK: constexpr, WORLD: constexpr, DIM: constexpr, WORD: constexpr,
    SENTINEL: constexpr, BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < DIM
    gain = tl.load(weight + column, mask=mask, other=0.0)
    after_previous(PDL)
    for row in range(program, rows, tl.num_programs(0)):
        generation = tl.load(generations + row)
        words = _words(tl.load(part + row * DIM + column, mask=mask, other=0.0), WORD, SENTINEL)
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                there = _row_words(buffers, peer, generation, row, capacity, WORLD, DIM, WORD)
                tl.store(there + RANK * DIM + column, words, mask=mask)
    tl.debug_barrier()
    for row in range(program, rows, tl.num_programs(0)):
        _reduce_row(
            part, buffers, buffers, generations, residual, gain, out, row, row, capacity, capacity, eps,
            RANK, WORLD, DIM, WORD, SENTINEL, BLOCK, False,
        )  # fmt: skip


@jit
def _row(program: tensor, block: tensor) -> tensor:
    """A program's row in group `block` of as many rows as programs; shifted in each group, so that it owns some."""
    programs = tl.num_programs(0)
    return block * programs + (program + block) % programs


@jit_varying("rows", "capacity")
def _two_shot_kernel(
    part: tensor, buffers: tensor, results: tensor, generations: tensor, residual: tensor, weight: tensor, out: tensor,
    rows: tensor, capacity: tensor, eps: tensor, RANK: constexpr, WORLD: constexpr, DIM: constexpr, WORD: constexpr,
    SENTINEL: constexpr, BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < DIM
    share = tl.cdiv(capacity, WORLD)
    blocks = tl.cdiv(rows, tl.num_programs(0))
    gain = tl.load(weight + column, mask=mask, other=0.0)
    after_previous(PDL)
    for block in range(blocks):  # send the others' rows to their owners
        row = _row(program, block)
        if (row < rows) & (row % WORLD != RANK):
            generation = tl.load(generations + row)
            words = _words(tl.load(part + row * DIM + column, mask=mask, other=0.0), WORD, SENTINEL)
            there = _row_words(buffers, row % WORLD, generation, row // WORLD, share, WORLD, DIM, WORD)
            tl.store(there + RANK * DIM + column, words, mask=mask)
    tl.debug_barrier()
    for block in range(blocks):  # reduce and norm the rank's own rows, and send them to all
        row = _row(program, block)
        if (row < rows) & (row % WORLD == RANK):
            _reduce_row(
                part, buffers, results, generations, residual, gain, out, row, row // WORLD, share, capacity, eps,
                RANK, WORLD, DIM, WORD, SENTINEL, BLOCK, True,
            )  # fmt: skip
    tl.debug_barrier()
    for block in range(blocks):  # receive the norms of the others' rows from their owners
        row = _row(program, block)
        if (row < rows) & (row % WORLD != RANK):
            generation = tl.load(generations + row)
            stale = _row_words(results, RANK, (generation + 2) % 3, row, capacity, 1, DIM, WORD) + column
            _reset(stale, mask, -1, 1, DIM, WORD, SENTINEL, BLOCK)
            here = _row_words(results, RANK, generation, row, capacity, 1, DIM, WORD) + column
            least = SENTINEL
            while least == SENTINEL:
                words = tl.load(here, mask=mask, other=0, volatile=True)
                least = tl.min(words.to(tl.int32), axis=0)
                if least != SENTINEL:
                    tl.store(out + row * DIM + column, words.to(out.dtype.element_ty, bitcast=True), mask=mask)
            _advance(generations, row, generation)


def one_shot_add_rms_norm(
    buffers: ReceiveBuffers, part: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    """residual += the sum of every rank's part, and its norm into `out`; each rank reduces all rows.

    part, residual, out (T, D), contiguous and of the buffers' dtype, T up to `buffers.rows`; weight (D,). The same bits
    on every rank. A call with no rows compiles and loads the kernel, and does not wait.
    """
    _launch(_one_shot_kernel, buffers, part, residual, weight, eps, out)


def two_shot_add_rms_norm(
    buffers: ReceiveBuffers, part: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    """The same, where each rank reduces the rows that it owns and sends their norms to the others.

    Rank r owns rows r, r + WORLD, ...; only these rows of its residual are right from then on.
    """
    _launch(_two_shot_kernel, buffers, part, residual, weight, eps, out)


def _launch(
    kernel: Kernel, buffers: ReceiveBuffers, part: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    rows, dim = residual.shape
    assert rows <= buffers.rows
    assert dim == buffers.dim
    assert all(x.is_contiguous() and x.dtype == residual.dtype and x.shape == residual.shape for x in (part, out))
    block, bits = next_power_of_2(dim), 8 * residual.element_size()
    kernel[(max(1, min(rows, MAX_BLOCKS)),)](
        part, *buffers.addresses, buffers.generations, residual, weight, out, rows, buffers.rows, eps,
        RANK=buffers.rank, WORLD=buffers.world, DIM=dim, WORD={16: tl.int16, 32: tl.int32}[bits],
        SENTINEL=-(2 ** (bits - 1)), BLOCK=block, num_warps=warps_for(block), **launch_options(),
    )  # fmt: skip
