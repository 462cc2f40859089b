"""Which tokens top_k, top_p and min_p keep, found without a sort by one program a row.

A token is kept when fewer than k tokens are more probable, when those more probable hold less than p of the mass, and
when it is at least min_p times as probable as the first: all three are thresholds on its logit, the first two found by
bisection over the bit patterns of floats. Only strands (64 consecutive tokens) whose highest logit reaches a bound are
looked at: at least w tokens are at or above the w-th highest of the strands' maxima, so that for w = k the k-th
highest logit is among them.
"""

from __future__ import annotations

import triton.language as tl

from minisgl.gpu.kernels.jit import jit
from minisgl.gpu.kernels.noise import exponential, uniform

STRAND = 64
PER_STRAND = tl.constexpr(STRAND)
WIDTH = tl.constexpr(64)
"""Strands that top_p alone looks at first; eight times as many each time their mass does not suffice."""
BLOCK = tl.constexpr(2048)
LOWEST = tl.constexpr(-3.0e38)
"""Below it a maximum is -inf: every token was masked."""
LEAST_SHARE = tl.constexpr(1e-37)
"""A min_p of 0, with a logarithm; the noise could not lift a token of so small a share above the first one."""
NO_TOKEN = tl.constexpr(2**31 - 1)


@jit
def float_key(x: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """An int32 ordered as the float32 x, without the SHIFT low bits that are zero in all of them."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@jit
def key_float(key: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """The float32 of a key, its SHIFT low bits zero, below zero too."""
    bits = key << SHIFT
    return (bits ^ ((bits >> 31) & ((0x7FFFFFFF >> SHIFT) << SHIFT))).to(tl.float32, bitcast=True)


@jit
def mask_stops(x: tl.tensor, tokens: tl.tensor, stop_ids: tl.tensor, STOPS: tl.constexpr) -> tl.tensor:
    """Logits with -inf where the token is a stop id."""
    for index in range(STOPS):
        x = tl.where(tokens == tl.load(stop_ids + index), float("-inf"), x)
    return x


# A row is the tuple (logits, vocab, stop_ids, masked, top, inverse): its logits, their number, the ids to mask and
# whether to, its highest logit, and 1 / T.


@jit
def _listed_logits(
    row: tl.tensor, strands: tl.tensor, count: tl.tensor, start: tl.tensor, STOPS: tl.constexpr
) -> tl.tensor:
    """Tokens and logits of a block of the listed strands; -inf past the list, past the vocabulary and at stop ids."""
    logits, vocab, stop_ids, masked = row[0], row[1], row[2], row[3]
    index = start + tl.arange(0, BLOCK)
    listed = index < count * PER_STRAND
    strand = tl.load(strands + index // PER_STRAND, mask=listed, other=0)
    tokens = strand * PER_STRAND + index % PER_STRAND
    x = tl.load(logits + tokens, mask=listed & (tokens < vocab), other=float("-inf")).to(tl.float32)
    if masked:
        x = mask_stops(x, tokens, stop_ids, STOPS)
    return tokens, x


@jit
def _list_strands(strands: tl.tensor, live: tl.tensor, BLOCK_STRANDS: tl.constexpr) -> tl.tensor:
    """Write the numbers of the live strands in ascending order, and return how many they are."""
    ordinal = tl.cumsum(live.to(tl.int32), axis=0)
    tl.debug_barrier()  # all of the program is done with the list before
    tl.store(strands + ordinal - 1, tl.arange(0, BLOCK_STRANDS), mask=live)
    tl.debug_barrier()  # all of the program sees this one
    return tl.max(ordinal, axis=0)


@jit
def _bound(tops: tl.tensor, width: tl.tensor, STRANDS: tl.constexpr, SHIFT: tl.constexpr) -> tl.tensor:
    """The key of the `width`-th highest of the strands' maxima, or of less than any logit when there are fewer."""
    lowest = float_key(tl.maximum(tl.min(tops, axis=0), LOWEST), SHIFT)  # a strand of masked tokens has -inf
    highest = float_key(tl.max(tops, axis=0), SHIFT)
    while lowest < highest:
        middle = (lowest & highest) + ((lowest ^ highest) >> 1)
        if tl.sum((tops > key_float(middle, SHIFT)).to(tl.int32), axis=0) < width:
            highest = middle
        else:
            lowest = middle + 1
    return tl.where(width <= STRANDS, highest, float_key(tl.full((), LOWEST, tl.float32), SHIFT))


@jit
def _above(value: tl.tensor, row: tl.tensor, strands: tl.tensor, count: tl.tensor, STOPS: tl.constexpr) -> tl.tensor:
    """How many tokens of the listed strands are higher than a value, and their mass: the sum of exp((x - top) / T)."""
    top, inverse = row[4], row[5]
    counts = tl.zeros((BLOCK,), tl.int32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count * PER_STRAND, BLOCK):
        x = _listed_logits(row, strands, count, start, STOPS)[1]
        higher = x > value
        counts += higher.to(tl.int32)
        masses += tl.where(higher, tl.exp((x - top) * inverse), 0.0)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@jit
def _least_kept(
    lowest: tl.tensor,
    limit: tl.tensor,
    mass: tl.tensor,
    row: tl.tensor,
    strands: tl.tensor,
    count: tl.tensor,
    STOPS: tl.constexpr,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """The least key, from `lowest` up, above which are fewer than `limit` tokens and less than `mass`."""
    highest = float_key(row[4], SHIFT)  # nothing is above the top
    while lowest < highest:
        middle = (lowest & highest) + ((lowest ^ highest) >> 1)
        number, share = _above(key_float(middle, SHIFT), row, strands, count, STOPS)
        if (number < limit) & (share < mass):
            highest = middle
        else:
            lowest = middle + 1
    return highest


@jit
def _winner(
    least: tl.tensor, minimum: tl.tensor, keys: tl.tensor, row: tl.tensor, strands: tl.tensor, count: tl.tensor,
    STOPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The token with the highest score among those kept in the listed strands; of equal ones the lowest id."""
    top, inverse = row[4], row[5]
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    winners = tl.full((BLOCK,), NO_TOKEN, tl.int32)
    for start in range(0, count * PER_STRAND, BLOCK):
        tokens, x = _listed_logits(row, strands, count, start, STOPS)
        scaled = (x - top) * inverse
        score = scaled - tl.log(exponential(uniform(keys, tokens)))
        better = (x >= least) & (scaled >= minimum) & (score > best)
        best = tl.where(better, score, best)
        winners = tl.where(better, tokens, winners)
    return tl.min(tl.where(best == tl.max(best, axis=0), winners, NO_TOKEN), axis=0)


@jit
def filtered_winner(
    winner: tl.tensor, row: tl.tensor, keys: tl.tensor, limit: tl.tensor, p: tl.tensor, min_p: tl.tensor,
    mass: tl.tensor, strand_maxima: tl.tensor, strands: tl.tensor,
    STOPS: tl.constexpr, STRANDS: tl.constexpr, BLOCK_STRANDS: tl.constexpr, SHIFT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The winner among the kept tokens of a row, given the `winner` among all, which it is if it is kept.

    `mass` is the sum of exp((x - top) / T) over the vocabulary; `limit` is top_k, or vocab where that is off.
    strand_maxima (STRANDS,) are the highest logits of each strand; strands (STRANDS,) is scratch.
    """
    logits, vocab, top, inverse = row[0], row[1], row[4], row[5]
    index = tl.arange(0, BLOCK_STRANDS)
    exists = index < STRANDS
    tops = tl.load(strand_maxima + index, mask=exists, other=float("-inf"))
    least = float("-inf")
    width = tl.where(limit < vocab, limit, WIDTH)
    searching = (limit < vocab) | (p < 1.0)
    while searching:
        bound = _bound(tops, width, STRANDS, SHIFT)
        count = _list_strands(strands, (tops >= key_float(bound, SHIFT)) & exists, BLOCK_STRANDS)
        share, first = p * mass, bound - 1
        if limit < vocab:
            first = _least_kept(bound, limit, float("inf"), row, strands, count, STOPS, SHIFT)
            kth = key_float(first, SHIFT)
            number, above = _above(kth, row, strands, count, STOPS)
            share = p * (above + (limit - number).to(tl.float32) * tl.exp((kth - top) * inverse))
        if p < 1.0:
            first = _least_kept(first, limit, share, row, strands, count, STOPS, SHIFT)
        # Something below the bound is kept as well: what is at or above it does not hold p of the mass.
        searching = (first < bound) & (width <= STRANDS)
        width *= 8
        least = key_float(first, SHIFT)
    minimum = tl.log(tl.maximum(min_p, LEAST_SHARE))
    value = tl.load(logits + winner).to(tl.float32)
    if (value < least) | ((value - top) * inverse < minimum):
        count = _list_strands(strands, (tops >= least) & ((tops - top) * inverse >= minimum) & exists, BLOCK_STRANDS)
        winner = _winner(least, minimum, keys, row, strands, count, STOPS)
    return winner
