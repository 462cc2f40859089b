"""Sums of rows over the GPUs of a group with the addition and norm that follow, in one launch, without flags or fences.

Ranks write rows into each other's inboxes, in symmetric memory, and poll their own. A word that has not come holds a
sentinel, the bits of -0.0, and -0.0 is sent as +0.0: the data are their own flags (an idea of Lamport's; in NCCL's LL
protocol a flag goes with each word), and a row is there once none of its words is the sentinel, in whatever order they
came.

Each row of an inbox is there in three generations, all of sentinels at the start, and each rank keeps the row's turn g,
0 at the start. A call on some rows does for each of them, and for no other row, on every rank:

1. it writes what it sends to generation g of other ranks' inboxes;
2. it resets generation g + 2 (mod 3) of its own inboxes, which it read in the call before, to the sentinel;
3. it reads generation g of its own inboxes until all the words of this call are there;
4. it sets g to g + 1 (mod 3).

All ranks make the same calls in the same order, so that g is the same on all in a row's k-th call. Then what rank A
finds in 3 are sentinels and the words of call k, for every rank B that writes to it:

- The words of call k - 3, which lay there before, A read in that call and reset in its call k - 2.
- B writes in its call k, after its call k - 1 had ended. There it read what A sent in A's call k - 1, for who writes to
  a rank in a call also reads from it: all from all in one shot; in two a row's owner and every other rank. And A's call
  k - 1 began when A's call k - 2, with the reset, had ended.
- A resets the generation again in its call k + 1, after its call k has read all that B wrote.

Calls of a rank do not overlap: what one wrote to its own memory is there when the next has passed `after_previous`.
A row is the same program's on every rank, and this program alone touches the row's turn. It sends all that needs no
waiting before it waits, and waits only for its like on other ranks, which run at once (MAX_PROGRAMS): so it ends.
Weak stores will do, as each word is written whole and says itself that it is there; a barrier behind them keeps the
compiler from moving them past a loop that polls. Polls are volatile loads: each reads memory anew, at system scope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.jit import after_previous, jit, jit_varying, launch_options, warps_for
from minisgl.gpu.kernels.ranks import MAX_PROGRAMS, tensor_of

GENERATIONS = 3
UNWRITTEN = -0.0
"""What every element of an inbox is at the start."""


def inbox_size(rows: int, senders: int, dim: int) -> int:
    """Elements of an inbox (GENERATIONS, rows, senders, dim), all UNWRITTEN at the start."""
    return GENERATIONS * rows * senders * dim


@dataclass(frozen=True)
class Inboxes:
    """The inboxes of one way to sum, for up to `rows` rows of `dim` elements of one dtype.

    `own` is this rank's memory, which must live as long as any rank does: for one shot an inbox of
    `inbox_size(rows, WORLD, dim)`; for two one of `inbox_size(ceil(rows / WORLD), WORLD, dim)`, for parts of the rows
    that it owns, and one of `inbox_size(rows, 1, dim)`, where the owners of the others send their norms.
    `addresses` int64 (WORLD,) says for each where every rank's is. turns: g of each row, int32 (rows,), zero at the
    start, which this rank alone knows.
    """

    rank: int
    world: int
    rows: int
    dim: int
    own: tuple[Tensor, ...]
    addresses: tuple[Tensor, ...]
    turns: Tensor


@jit
def _place(
    inboxes: tl.tensor, rank: tl.tensor, turn: tl.tensor, row: tl.tensor, capacity: tl.tensor,
    SENDERS: tl.constexpr, DIM: tl.constexpr, WORD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The words of the first sender's row; the others' follow it."""
    return tensor_of(inboxes, rank, WORD) + (turn * capacity + row) * SENDERS * DIM


@jit
def _words(x: tl.tensor, WORD: tl.constexpr, SENTINEL: tl.constexpr) -> tl.tensor:
    """The bits of x as they are sent: +0.0 for -0.0."""
    bits = x.to(WORD, bitcast=True)
    return tl.where(bits == SENTINEL, 0, bits).to(WORD)


@jit
def _reset(
    place: tl.tensor, mask: tl.tensor, RANK: tl.constexpr, SENDERS: tl.constexpr, DIM: tl.constexpr,
    WORD: tl.constexpr, SENTINEL: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Sentinels for what the senders but this rank wrote."""
    for sender in tl.static_range(SENDERS):
        if sender != RANK:
            tl.store(place + sender * DIM, tl.full((BLOCK,), SENTINEL, WORD), mask=mask)


@jit
def _advance(turns: tl.tensor, row: tl.tensor, turn: tl.tensor) -> None:
    tl.debug_barrier()  # all of the program has read the turn
    tl.store(turns + row, (turn + 1) % 3)


@jit
def _arrived(
    own: tl.tensor, place: tl.tensor, mask: tl.tensor, RANK: tl.constexpr, SENDERS: tl.constexpr, DIM: tl.constexpr,
    SENTINEL: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum in float32 of this rank's words and the others', in the order of ranks; and the least of all words.

    It is good once that is not the sentinel, the least integer there is.
    """
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
def _sum_row(
    part: tl.tensor, inboxes: tl.tensor, results: tl.tensor, turns: tl.tensor, residual: tl.tensor, gain: tl.tensor,
    out: tl.tensor, row: tl.tensor, box: tl.tensor, boxes: tl.tensor, capacity: tl.tensor, eps: tl.tensor,
    RANK: tl.constexpr, WORLD: tl.constexpr, DIM: tl.constexpr, WORD: tl.constexpr, SENTINEL: tl.constexpr,
    BLOCK: tl.constexpr, SEND: tl.constexpr,
) -> None:  # fmt: skip
    """Add a row, whose parts come to `box` of this rank's inbox, to the residual stream and norm it, as
    `reference.add_rms_norm` rounds. SEND: to the other ranks too.
    """
    column = tl.arange(0, BLOCK)
    mask, place = column < DIM, row * DIM + column
    DTYPE: tl.constexpr = out.dtype.element_ty
    turn = tl.load(turns + row)
    own = _words(tl.load(part + place, mask=mask, other=0.0), WORD, SENTINEL)
    before = tl.load(residual + place, mask=mask, other=0.0)
    stale = _place(inboxes, RANK, (turn + 2) % 3, box, boxes, WORLD, DIM, WORD) + column
    _reset(stale, mask, RANK, WORLD, DIM, WORD, SENTINEL, BLOCK)
    here = _place(inboxes, RANK, turn, box, boxes, WORLD, DIM, WORD) + column
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
                        there = _place(results, peer, turn, row, capacity, 1, DIM, WORD)
                        tl.store(there + column, words, mask=mask)
            tl.store(out + place, words.to(DTYPE, bitcast=True), mask=mask)
    _advance(turns, row, turn)


@jit_varying("rows", "capacity")
def _one_shot_kernel(
    part: tl.tensor, inboxes: tl.tensor, turns: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor,
    rows: tl.tensor, capacity: tl.tensor, eps: tl.tensor,
    RANK: tl.constexpr, WORLD: tl.constexpr, DIM: tl.constexpr, WORD: tl.constexpr,
    SENTINEL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < DIM
    gain = tl.load(weight + column, mask=mask, other=0.0)
    after_previous(PDL)
    for row in range(program, rows, tl.num_programs(0)):
        turn = tl.load(turns + row)
        words = _words(tl.load(part + row * DIM + column, mask=mask, other=0.0), WORD, SENTINEL)
        for peer in tl.static_range(WORLD):
            if peer != RANK:
                there = _place(inboxes, peer, turn, row, capacity, WORLD, DIM, WORD)
                tl.store(there + RANK * DIM + column, words, mask=mask)
    tl.debug_barrier()
    for row in range(program, rows, tl.num_programs(0)):
        _sum_row(
            part, inboxes, inboxes, turns, residual, gain, out, row, row, capacity, capacity, eps,
            RANK, WORLD, DIM, WORD, SENTINEL, BLOCK, False,
        )  # fmt: skip


@jit
def _row(program: tl.tensor, block: tl.tensor) -> tl.tensor:
    """A program's row in the block-th group of as many rows as programs: another one in each, so that it owns some."""
    programs = tl.num_programs(0)
    return block * programs + (program + block) % programs


@jit_varying("rows", "capacity")
def _two_shot_kernel(
    part: tl.tensor, inboxes: tl.tensor, results: tl.tensor, turns: tl.tensor, residual: tl.tensor, weight: tl.tensor,
    out: tl.tensor, rows: tl.tensor, capacity: tl.tensor, eps: tl.tensor,
    RANK: tl.constexpr, WORLD: tl.constexpr, DIM: tl.constexpr, WORD: tl.constexpr,
    SENTINEL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < DIM
    share = tl.cdiv(capacity, WORLD)
    blocks = tl.cdiv(rows, tl.num_programs(0))
    gain = tl.load(weight + column, mask=mask, other=0.0)
    after_previous(PDL)
    for block in range(blocks):  # the others' rows: to their owners
        row = _row(program, block)
        if (row < rows) & (row % WORLD != RANK):
            turn = tl.load(turns + row)
            words = _words(tl.load(part + row * DIM + column, mask=mask, other=0.0), WORD, SENTINEL)
            there = _place(inboxes, row % WORLD, turn, row // WORLD, share, WORLD, DIM, WORD)
            tl.store(there + RANK * DIM + column, words, mask=mask)
    tl.debug_barrier()
    for block in range(blocks):  # its own: what they sum up to, normed, to all
        row = _row(program, block)
        if (row < rows) & (row % WORLD == RANK):
            _sum_row(
                part, inboxes, results, turns, residual, gain, out, row, row // WORLD, share, capacity, eps,
                RANK, WORLD, DIM, WORD, SENTINEL, BLOCK, True,
            )  # fmt: skip
    tl.debug_barrier()
    for block in range(blocks):  # the others' rows: their norms, from their owners
        row = _row(program, block)
        if (row < rows) & (row % WORLD != RANK):
            turn = tl.load(turns + row)
            stale = _place(results, RANK, (turn + 2) % 3, row, capacity, 1, DIM, WORD) + column
            _reset(stale, mask, -1, 1, DIM, WORD, SENTINEL, BLOCK)
            here = _place(results, RANK, turn, row, capacity, 1, DIM, WORD) + column
            least = SENTINEL
            while least == SENTINEL:
                words = tl.load(here, mask=mask, other=0, volatile=True)
                least = tl.min(words.to(tl.int32), axis=0)
                if least != SENTINEL:
                    tl.store(out + row * DIM + column, words.to(out.dtype.element_ty, bitcast=True), mask=mask)
            _advance(turns, row, turn)


def one_shot_add_rms_norm(
    inboxes: Inboxes, part: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    """residual += the sum of every rank's part, and its norm into `out`: every rank does all of it.

    part, residual, out (T, D), contiguous and of the inboxes' dtype, T up to `inboxes.rows`; weight (D,). The same bits
    on every rank. A call of no rows compiles and loads the kernel, and waits for nobody.
    """
    rows, options = _launch(inboxes, part, residual, out)
    _one_shot_kernel[(max(1, min(rows, MAX_PROGRAMS)),)](
        part, *inboxes.addresses, inboxes.turns, residual, weight, out, rows, inboxes.rows, eps, **options
    )


def two_shot_add_rms_norm(
    inboxes: Inboxes, part: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    """The same, where each rank does the rows that it owns and sends their norms to the others.

    Rank r owns rows r, r + WORLD, ...: of its residual only these are right from then on.
    """
    rows, options = _launch(inboxes, part, residual, out)
    _two_shot_kernel[(max(1, min(rows, MAX_PROGRAMS)),)](
        part, *inboxes.addresses, inboxes.turns, residual, weight, out, rows, inboxes.rows, eps, **options
    )


def _launch(inboxes: Inboxes, part: Tensor, residual: Tensor, out: Tensor) -> tuple[int, dict[str, Any]]:
    """The rows of a call, and its constants and options."""
    rows, dim = residual.shape
    assert rows <= inboxes.rows
    assert dim == inboxes.dim
    assert all(x.is_contiguous() and x.dtype == residual.dtype and x.shape == residual.shape for x in (part, out))
    pdl = launch_options()
    block = triton.next_power_of_2(dim)
    bits = 8 * residual.element_size()
    return rows, {
        "RANK": inboxes.rank, "WORLD": inboxes.world, "DIM": dim, "WORD": {16: tl.int16, 32: tl.int32}[bits],
        "SENTINEL": -(2 ** (bits - 1)), "BLOCK": block, "PDL": bool(pdl), "num_warps": warps_for(block), **pdl,
    }  # fmt: skip
