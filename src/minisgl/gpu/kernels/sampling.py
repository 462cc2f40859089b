"""Sampling straight from the logits, in one pass over the vocabulary where no filter is asked for.

Two launches. In the first, every row's vocabulary is split over many programs, each of which finds its split's winner
(highest logit, or highest logit / T + noise) and, for rows with a filter, the sum of its exponentials and the highest
logit of every strand of 64 tokens. In the second, one program a row picks the winner of winners; a row with a filter
looks for the filter's threshold among the few strands that can matter (`filtering.py`). What a row needs is decided on
the device. Splits do not depend on the batch, so neither does the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.core.sampler import SamplingRows
from minisgl.gpu.kernels.filtering import LOWEST, STRAND, filtered_winner, mask_stops
from minisgl.gpu.kernels.jit import jit, jit_varying
from minisgl.gpu.kernels.noise import exponential, row_keys, scaled_uniform, uniform

SPLIT = 4096
"""Tokens that a program of the first launch takes; a power of two from STRAND up."""
SPLIT_WARPS = 8
"""Two loads of 16 bytes a thread, and four programs a multiprocessor."""
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits that are zero in every logit of the dtype once it is float32."""
SMALLEST_TEMPERATURE = tl.constexpr(1e-30)
LOG2_E = tl.constexpr(1.4426950408889634)
SLACK = tl.constexpr(1.0 + 1e-5)
LARGEST_INT = tl.constexpr(2**31 - 1)
FARTHEST = tl.constexpr(90.0)
"""Factors of two by which a token can be less probable than the highest; the noise makes up for at most 56 of them."""
FARTHEST_RANK = tl.constexpr((88 + 127) << 23)
"""The bits of 2^88, less than any u * 2^90 for u from 0.5 up."""
LARGEST_EXPONENT = tl.constexpr(80.0)


@jit
def row_kind(parameters: tl.tensor, slot: tl.tensor, vocab: tl.tensor) -> tl.tensor:
    """Whether a row is drawn rather than greedy, whether it has a filter, 1 / T, and top_k (or vocab), top_p, min_p."""
    temperature, top_p, min_p, top_k = parameters[0], parameters[1], parameters[2], parameters[3]
    heat, p, minimum, k = (
        tl.load(temperature + slot),
        tl.load(top_p + slot),
        tl.load(min_p + slot),
        tl.load(top_k + slot),
    )
    drawn = (heat > 0.0) & (k != 1)
    limit = tl.where((k > 0) & (k < vocab), k, vocab)
    filtered = drawn & ((limit < vocab) | (p < 1.0) | (minimum > 0.0))
    return drawn, filtered, 1.0 / tl.maximum(heat, SMALLEST_TEMPERATURE), limit, p, minimum


@jit
def _beaten_by(ranked: tl.tensor, u: tl.tensor, PLACE: tl.constexpr) -> tl.tensor:
    """The highest rank that a token with a higher score than this one can have; never that of a masked token."""
    # E / u = 1 + u/2 + u^2/3 + u^3/4 + ... is at most (1 - u/2) / (1 - u) = 1 + u/2 + u^2/2 + u^3/2 + ...
    highest = (ranked | PLACE).to(tl.float32, bitcast=True) * ((1.0 - 0.5 * u) / (1.0 - u) * SLACK)
    return tl.minimum(highest.to(tl.int32, bitcast=True) | PLACE, FARTHEST_RANK)


@jit
def _drawn(
    x: tl.tensor, logits: tl.tensor, keys: tl.tensor, first: tl.tensor, reference: tl.tensor, inverse: tl.tensor,
    SPLIT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The place of the highest score (x - reference) / T - log E among the SPLIT logits x from token `first` on.

    That is the least E / exp((x - reference) / T). E is at least u, and nearly u where u is small: the token with the
    least u / exp(...) wins unless others come within E / u of it. Only they, one after the other, need logarithms.
    A token's rank is the bits of that ratio, ordered as it is for it is positive, the low ones giving way to its place.
    """
    PLACE: tl.constexpr = SPLIT - 1
    places = tl.arange(0, SPLIT)
    near = (keys[0] ^ first.to(tl.uint32), keys[1])  # token first + place is first ^ place, first a multiple of SPLIT
    ratio = scaled_uniform(near, places) * tl.exp2(tl.minimum((reference - x) * (inverse * LOG2_E), FARTHEST))
    ranks = (ratio.to(tl.int32, bitcast=True) & (LARGEST_INT - PLACE)) | places
    rank = tl.min(ranks, axis=0)
    winner = rank & PLACE
    limit = _beaten_by(rank, uniform(near, winner), PLACE)
    if tl.min(tl.where(ranks > rank, ranks, LARGEST_INT), axis=0) <= limit:
        best = tl.full((), float("-inf"), tl.float32)
        while rank <= limit:
            place = rank & PLACE
            u = uniform(near, place)
            scaled = (tl.load(logits + first + place).to(tl.float32) - reference) * inverse
            score = scaled - tl.log(exponential(u))
            better = (score > best) | ((score == best) & (place < winner))
            winner = tl.where(better, place, winner)
            best = tl.maximum(best, score)
            limit = tl.minimum(limit, _beaten_by(rank, u, PLACE))
            rank = tl.min(tl.where(ranks > rank, ranks, LARGEST_INT), axis=0)
    return winner


@jit_varying("slots", "positions")
def _split_kernel(
    logits: tl.tensor, stride: tl.tensor, slots: tl.tensor, positions: tl.tensor, parameters: tl.tensor,
    stop_ids: tl.tensor, winners: tl.tensor, maxima: tl.tensor, masses: tl.tensor, strand_maxima: tl.tensor,
    vocab: tl.tensor, origin: tl.tensor,
    STOPS: tl.constexpr, SPLIT: tl.constexpr, STRAND: tl.constexpr,
) -> None:  # fmt: skip
    split, row = tl.program_id(0), tl.program_id(1)
    places = tl.arange(0, SPLIT)
    first = origin + split * SPLIT
    row_logits = logits + row.to(tl.int64) * stride - origin  # by token id
    x = tl.load(row_logits + first + places, mask=first + places < vocab, other=float("-inf")).to(tl.float32)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    seed, min_len = parameters[4], parameters[5]
    kind = row_kind(parameters, slot, vocab)
    drawn, filtered, inverse = kind[0], kind[1], kind[2]
    if position < tl.load(min_len + slot):
        x = mask_stops(x, first + places, stop_ids + slot * STOPS, STOPS)
    highest = tl.max(x, axis=0)
    place = row * tl.num_programs(0) + split
    if drawn:
        keys = row_keys(tl.load(seed + slot), position)
        reference = tl.where(highest > LOWEST, highest, 0.0)
        winner = _drawn(x, row_logits, keys, first, reference, inverse, SPLIT)
        if filtered:
            tl.store(masses + place, tl.sum(tl.exp((x - reference) * inverse), axis=0))
            strands = tl.max(tl.reshape(x, (SPLIT // STRAND, STRAND)), axis=1)
            tl.store(strand_maxima + place * (SPLIT // STRAND) + tl.arange(0, SPLIT // STRAND), strands)
    else:
        winner = tl.min(tl.where(x == highest, places, SPLIT - 1), axis=0)
    winner = tl.where(highest > LOWEST, winner, 0)  # always within the vocabulary
    tl.store(maxima + place, highest)
    tl.store(winners + place, first + winner)


@jit_varying("slots", "positions")
def _choose_kernel(
    logits: tl.tensor, stride: tl.tensor, slots: tl.tensor, positions: tl.tensor, parameters: tl.tensor,
    stop_ids: tl.tensor, winners: tl.tensor, maxima: tl.tensor, masses: tl.tensor, strand_maxima: tl.tensor,
    strand_lists: tl.tensor, out: tl.tensor, vocab: tl.tensor, splits: tl.tensor,
    STOPS: tl.constexpr, STRANDS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_STRANDS: tl.constexpr,
    SHIFT: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    seed, min_len = parameters[4], parameters[5]
    drawn, filtered, inverse, limit, p, min_p = row_kind(parameters, slot, vocab)
    split = tl.arange(0, BLOCK_SPLITS)
    exists = split < splits
    candidates = tl.load(winners + row * splits + split, mask=exists, other=0)
    tops = tl.load(maxima + row * splits + split, mask=exists, other=float("-inf"))
    top = tl.max(tops, axis=0)
    row_logits = logits + row.to(tl.int64) * stride
    keys = row_keys(tl.load(seed + slot), position)
    score = tops
    if drawn:
        scaled = (tl.load(row_logits + candidates).to(tl.float32) - top) * inverse
        score = tl.where(tops > LOWEST, scaled - tl.log(exponential(uniform(keys, candidates))), float("-inf"))
    best = tl.argmax(score, axis=0)
    winner = tl.sum(tl.where(split == best, candidates, 0), axis=0)
    if filtered:
        share = tl.exp(tl.maximum((tops - top) * inverse, -LARGEST_EXPONENT))
        mass = tl.sum(tl.load(masses + row * splits + split, mask=exists & (tops > LOWEST), other=0.0) * share, axis=0)
        masked = position < tl.load(min_len + slot)
        winner = filtered_winner(
            winner, (row_logits, vocab, stop_ids + slot * STOPS, masked, top, inverse), keys, limit, p, min_p, mass,
            strand_maxima + row * STRANDS, strand_lists + row * STRANDS, STOPS, STRANDS, BLOCK_STRANDS, SHIFT,
        )  # fmt: skip
    tl.store(out + row, winner)


def sample(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
    """`ops.sampling.sample` of the rows `slots` of a table: the same tokens, up to the rounding of scores.

    logits (n, V), rows contiguous in themselves, float32, float16 or bfloat16; table rows as the engine's device
    tables hold them; slots int32 or int64 (n,); positions int32 (n,) of the chosen tokens -> int32 (n,).
    """
    rows, vocab = logits.shape
    device = logits.device
    splits = triton.cdiv(vocab, SPLIT)
    winners = torch.empty((rows, splits), dtype=torch.int32, device=device)
    maxima, masses = torch.empty((2, rows, splits), dtype=torch.float32, device=device)
    strand_maxima = torch.empty((rows, splits * (SPLIT // STRAND)), dtype=torch.float32, device=device)
    partial = (winners, maxima, masses, strand_maxima)
    split_winners(logits, table, slots, positions, partial, vocab=vocab, split=SPLIT)
    return choose(logits, table, slots, positions, partial, vocab=vocab)


Partial = tuple[Tensor, Tensor, Tensor, Tensor]
"""What the first launch leaves: winners int32, maxima and masses float32 (n, splits), strand maxima float32."""


def split_winners(
    logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor, partial: Partial, *, vocab: int,
    split: int, origin: int = 0,
) -> None:  # fmt: skip
    """The first launch, over the columns of logits: the tokens from `origin` on, of which those below `vocab` count.

    `split` is a power of two from STRAND up, of which `origin` is a multiple.
    """
    rows, columns = logits.shape
    assert logits.stride(1) == 1
    if rows:
        _split_kernel[(triton.cdiv(columns, split), rows)](
            logits, logits.stride(0), slots, positions, _parameters(table), table.stop_ids, *partial, vocab, origin,
            STOPS=table.stop_ids.shape[1], SPLIT=split, STRAND=STRAND, num_warps=max(1, SPLIT_WARPS * split // SPLIT),
        )  # fmt: skip


def choose(
    logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor, partial: Partial, *, vocab: int
) -> Tensor:
    """The second launch: tokens int32 (n,), by what the first one left of logits (n, at least vocab)."""
    rows, splits = partial[0].shape
    strands = partial[3].shape[1]
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        strand_lists = torch.empty((rows, strands), dtype=torch.int32, device=logits.device)
        _choose_kernel[(rows,)](
            logits, logits.stride(0), slots, positions, _parameters(table), table.stop_ids, *partial, strand_lists,
            out, vocab, splits, STOPS=table.stop_ids.shape[1], STRANDS=strands,
            BLOCK_SPLITS=triton.next_power_of_2(splits), BLOCK_STRANDS=triton.next_power_of_2(strands),
            SHIFT=KEY_SHIFT[logits.dtype], num_warps=16,
        )  # fmt: skip
    return out


def _parameters(table: SamplingRows) -> tuple[Tensor, ...]:
    return table.temperature, table.top_p, table.min_p, table.top_k, table.seed, table.min_len
