"""Sampling from the logits, in one pass over the vocabulary for rows without a filter. Twin: `core.sampler.sample`.

Two launches. In the first, each row's vocabulary is split over many thread blocks; each finds its split's winner
(highest logit, or highest logit / T + noise) and, for rows with a filter, the sum of its exponentials and the highest
logit of every segment of 64 tokens. In the second, one thread block per row picks the winner of winners, or looks for
the filter's threshold. What a row needs is decided on the device. Splits, and so results, do not depend on the batch.

Filters need no sort. A token is kept when fewer than top_k tokens are more probable, when those hold less than top_p of
the mass, and when it is at least min_p times as probable as the first. All three are thresholds on its logit; the first
two are found by bisection over the bit patterns of floats, in those segments only whose highest logit reaches a bound:
at least w tokens are at or above the w-th highest of the segments' maxima, so for w = k the k-th highest is among them.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.sampler import LARGEST_UNIFORM, SamplingRows
from minisgl.gpu.kernels.jit import cdiv, jit, jit_varying, next_power_of_2

SPLIT = 4096  # tokens per thread block of the first launch; a power of two from SEGMENT up
SPLIT_WARPS = 8  # two loads of 16 bytes per thread, and four thread blocks per multiprocessor
SEGMENT = 64
PER_SEGMENT = tl.constexpr(SEGMENT)
FIRST_WIDTH = tl.constexpr(64)  # segments that top_p alone looks at first; eight times as many each further time
BLOCK = tl.constexpr(2048)
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # low bits that are zero in every logit's float32
LOWEST = tl.constexpr(-3.0e38)  # below it a maximum is -inf: every token was masked
SMALLEST_TEMPERATURE = tl.constexpr(1e-30)
SMALLEST_MIN_P = tl.constexpr(1e-37)  # for a min_p of 0; the noise cannot make up for so small a probability
LARGEST = tl.constexpr(LARGEST_UNIFORM)
SERIES_BELOW = tl.constexpr(0.0625)  # below it `exponential` takes a series: 1 - u has lost the digits of a small u
LOG2_E = tl.constexpr(1.4426950408889634)
SLACK = tl.constexpr(1.0 + 1e-5)
LARGEST_INT = tl.constexpr(2**31 - 1)
FARTHEST = tl.constexpr(90.0)  # log2 of how much less probable a token may be than the first; the noise covers 56 of it
FARTHEST_RANK = tl.constexpr((88 + 127) << 23)  # the bits of 2^88, less than any u * 2^90 for u from 0.5 up
LARGEST_EXPONENT = tl.constexpr(80.0)


@jit
def row_keys(seed: tensor, position: tensor) -> tensor:
    """The two 32-bit keys of a row, from its int64 seed and int32 position (SplitMix64's finaliser)."""
    key = seed.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@jit
def _multiplied(bits: tensor) -> tensor:
    bits = bits * 0x85EBCA6B
    return (bits ^ (bits >> 13)) * 0xC2B2AE35


@jit
def token_hash(keys: tensor, tokens: tensor) -> tensor:
    """32 bits for each of int32 token ids, under a row's keys (MurmurHash3's finaliser, twice) -> uint32."""
    # x ^ (x >> 16) is linear and its own inverse. The one that ends the first finaliser and the one that begins the
    # second cancel, except for the second key between them, whose part is one scalar.
    low, high = keys
    ids = tokens.to(tl.uint32, bitcast=True)
    bits = _multiplied(ids ^ (ids >> 16) ^ (low ^ (low >> 16)))
    bits = _multiplied(bits ^ (high ^ (high >> 16)))
    return bits ^ (bits >> 16)


@jit
def scaled_uniform(keys: tensor, tokens: tensor) -> tensor:
    """The hash as float32 in (0, 2^32]."""
    return token_hash(keys, tokens).to(tl.float32) + 0.5


@jit
def uniform(keys: tensor, tokens: tensor) -> tensor:
    """The hash as float32 in (0, 1)."""
    return tl.minimum(scaled_uniform(keys, tokens) * (2.0**-32), LARGEST)


@jit
def exponential(u: tensor) -> tensor:
    """-log(1 - u), to 1e-6 of itself for every u of `uniform`; never below u."""
    # The series' next term is u^7 / 7, at most 9e-9 of the sum.
    sixth = 1.0 / 4 + u * (1.0 / 5 + u * (1.0 / 6))
    series = u * (1.0 + u * (1.0 / 2 + u * (1.0 / 3 + u * sixth)))
    return tl.where(u < SERIES_BELOW, series, -tl.log(1.0 - u))


@jit
def float_key(x: tensor, SHIFT: constexpr) -> tensor:
    """An int32 ordered as the float32 x, without the SHIFT low bits that are zero in all of them."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@jit
def key_float(key: tensor, SHIFT: constexpr) -> tensor:
    """The float32 of a key, its SHIFT low bits zero, below zero too."""
    bits = key << SHIFT
    return (bits ^ ((bits >> 31) & ((0x7FFFFFFF >> SHIFT) << SHIFT))).to(tl.float32, bitcast=True)


@jit
def mask_stops(x: tensor, tokens: tensor, stop_ids: tensor, STOPS: constexpr) -> tensor:
    for index in range(STOPS):
        x = tl.where(tokens == tl.load(stop_ids + index), float("-inf"), x)
    return x


# A row is the tuple (logits, vocab, stop_ids, masked, top, inverse): its logits, their number, the stop ids, whether to
# mask those, its highest logit, and 1 / T.
@jit
def _listed_logits(row: tensor, segments: tensor, count: tensor, start: tensor, STOPS: constexpr) -> tensor:
    """Tokens and logits of a block of the listed segments; -inf past the list, past the vocabulary and at stop ids."""
    logits, vocab, stop_ids, masked = row[0], row[1], row[2], row[3]
    index = start + tl.arange(0, BLOCK)
    listed = index < count * PER_SEGMENT
    segment = tl.load(segments + index // PER_SEGMENT, mask=listed, other=0)
    tokens = segment * PER_SEGMENT + index % PER_SEGMENT
    x = tl.load(logits + tokens, mask=listed & (tokens < vocab), other=float("-inf")).to(tl.float32)
    if masked:
        x = mask_stops(x, tokens, stop_ids, STOPS)
    return tokens, x


@jit
def _list_segments(segments: tensor, live: tensor, BLOCK_SEGMENTS: constexpr) -> tensor:
    """Write the numbers of the live segments in ascending order, and return how many they are."""
    ordinal = tl.cumsum(live.to(tl.int32), axis=0)
    tl.debug_barrier()  # every thread is done with the previous list
    tl.store(segments + ordinal - 1, tl.arange(0, BLOCK_SEGMENTS), mask=live)
    tl.debug_barrier()  # every thread sees this one
    return tl.max(ordinal, axis=0)


@jit
def _bound(tops: tensor, width: tensor, SEGMENTS: constexpr, SHIFT: constexpr) -> tensor:
    """The key of the `width`-th highest of the segments' maxima, or of less than any logit when there are fewer."""
    lowest = float_key(tl.maximum(tl.min(tops, axis=0), LOWEST), SHIFT)  # a segment of masked tokens has -inf
    highest = float_key(tl.max(tops, axis=0), SHIFT)
    while lowest < highest:
        middle = (lowest & highest) + ((lowest ^ highest) >> 1)
        if tl.sum((tops > key_float(middle, SHIFT)).to(tl.int32), axis=0) < width:
            highest = middle
        else:
            lowest = middle + 1
    return tl.where(width <= SEGMENTS, highest, float_key(tl.full((), LOWEST, tl.float32), SHIFT))


@jit
def _above(value: tensor, row: tensor, segments: tensor, count: tensor, STOPS: constexpr) -> tensor:
    """How many tokens of the listed segments are higher than a value, and their mass: the sum of exp((x - top) / T)."""
    top, inverse = row[4], row[5]
    counts = tl.zeros((BLOCK,), tl.int32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count * PER_SEGMENT, BLOCK):
        x = _listed_logits(row, segments, count, start, STOPS)[1]
        higher = x > value
        counts += higher.to(tl.int32)
        masses += tl.where(higher, tl.exp((x - top) * inverse), 0.0)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@jit
def _least_kept(
    lowest: tensor, limit: tensor, mass: tensor, row: tensor, segments: tensor, count: tensor, STOPS: constexpr,
    SHIFT: constexpr,
) -> tensor:  # fmt: skip
    # The least key, from `lowest` up, above which are fewer than `limit` tokens and less than `mass`.
    highest = float_key(row[4], SHIFT)  # nothing is above the top
    while lowest < highest:
        middle = (lowest & highest) + ((lowest ^ highest) >> 1)
        number, share = _above(key_float(middle, SHIFT), row, segments, count, STOPS)
        if (number < limit) & (share < mass):
            highest = middle
        else:
            lowest = middle + 1
    return highest


@jit
def _winner(
    least: tensor, minimum: tensor, keys: tensor, row: tensor, segments: tensor, count: tensor, STOPS: constexpr
) -> tensor:
    """The token with the highest score among those kept in the listed segments; of equal ones the lowest id."""
    top, inverse = row[4], row[5]
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    winners = tl.full((BLOCK,), LARGEST_INT, tl.int32)
    for start in range(0, count * PER_SEGMENT, BLOCK):
        tokens, x = _listed_logits(row, segments, count, start, STOPS)
        scaled = (x - top) * inverse
        score = scaled - tl.log(exponential(uniform(keys, tokens)))
        better = (x >= least) & (scaled >= minimum) & (score > best)
        best = tl.where(better, score, best)
        winners = tl.where(better, tokens, winners)
    return tl.min(tl.where(best == tl.max(best, axis=0), winners, LARGEST_INT), axis=0)


@jit
def filtered_winner(
    winner: tensor, row: tensor, keys: tensor, limit: tensor, p: tensor, min_p: tensor, mass: tensor,
    segment_maxima: tensor, segments: tensor, STOPS: constexpr, SEGMENTS: constexpr, BLOCK_SEGMENTS: constexpr,
    SHIFT: constexpr,
) -> tensor:  # fmt: skip
    # The winner among a row's kept tokens; it is `winner`, the winner among all tokens, if that one is kept.
    # `mass` is the sum of exp((x - top) / T) over the vocabulary; `limit` is top_k, or vocab where that is off.
    # segment_maxima (SEGMENTS,) are the highest logits of each segment; segments (SEGMENTS,) is scratch.
    logits, vocab, top, inverse = row[0], row[1], row[4], row[5]
    index = tl.arange(0, BLOCK_SEGMENTS)
    exists = index < SEGMENTS
    tops = tl.load(segment_maxima + index, mask=exists, other=float("-inf"))
    least = float("-inf")
    width = tl.where(limit < vocab, limit, FIRST_WIDTH)
    searching = (limit < vocab) | (p < 1.0)
    while searching:
        bound = _bound(tops, width, SEGMENTS, SHIFT)
        count = _list_segments(segments, (tops >= key_float(bound, SHIFT)) & exists, BLOCK_SEGMENTS)
        share, first = p * mass, bound - 1
        if limit < vocab:
            first = _least_kept(bound, limit, float("inf"), row, segments, count, STOPS, SHIFT)
            kth = key_float(first, SHIFT)
            number, above = _above(kth, row, segments, count, STOPS)
            share = p * (above + (limit - number).to(tl.float32) * tl.exp((kth - top) * inverse))
        if p < 1.0:
            first = _least_kept(first, limit, share, row, segments, count, STOPS, SHIFT)
        # first < bound: the tokens at or above the bound do not hold p of the mass, so some below it are kept too.
        searching = (first < bound) & (width <= SEGMENTS)
        width *= 8
        least = key_float(first, SHIFT)
    minimum = tl.log(tl.maximum(min_p, SMALLEST_MIN_P))
    value = tl.load(logits + winner).to(tl.float32)
    if (value < least) | ((value - top) * inverse < minimum):
        count = _list_segments(segments, (tops >= least) & ((tops - top) * inverse >= minimum) & exists, BLOCK_SEGMENTS)
        winner = _winner(least, minimum, keys, row, segments, count, STOPS)
    return winner


@jit
def row_kind(parameters: tensor, slot: tensor, vocab: tensor) -> tensor:
    """(sampled rather than greedy, has a filter, 1 / T, top_k or vocab, top_p, min_p) of a row."""
    temperature, top_p, min_p, top_k = parameters[0], parameters[1], parameters[2], parameters[3]
    heat, p = tl.load(temperature + slot), tl.load(top_p + slot)
    minimum, k = tl.load(min_p + slot), tl.load(top_k + slot)
    sampled = (heat > 0.0) & (k != 1)
    limit = tl.where((k > 0) & (k < vocab), k, vocab)
    filtered = sampled & ((limit < vocab) | (p < 1.0) | (minimum > 0.0))
    return sampled, filtered, 1.0 / tl.maximum(heat, SMALLEST_TEMPERATURE), limit, p, minimum


@jit
def _beaten_by(ranked: tensor, u: tensor, PLACE: constexpr) -> tensor:
    """The highest rank that a token with a higher score than this one can have; never that of a masked token."""
    # E / u = 1 + u/2 + u^2/3 + u^3/4 + ... is at most (1 - u/2) / (1 - u) = 1 + u/2 + u^2/2 + u^3/2 + ...
    highest = (ranked | PLACE).to(tl.float32, bitcast=True) * ((1.0 - 0.5 * u) / (1.0 - u) * SLACK)
    return tl.minimum(highest.to(tl.int32, bitcast=True) | PLACE, FARTHEST_RANK)


@jit
def _sampled_place(
    x: tensor, logits: tensor, keys: tensor, first: tensor, reference: tensor, inverse: tensor, SPLIT: constexpr
) -> tensor:
    # The place of the highest score (x - reference) / T - log E among the SPLIT logits x from token `first` on.
    # That is the least E / exp((x - reference) / T). E is at least u, and nearly u where u is small: the token with the
    # least u / exp(...) wins unless others come within E / u of it. Only those, one after the other, need logarithms.
    # A token's rank is that ratio's bits (positive floats and their bits are ordered alike), its place in the low ones.
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
    logits: tensor, stride: tensor, slots: tensor, positions: tensor, parameters: tensor, stop_ids: tensor,
    winners: tensor, maxima: tensor, masses: tensor, segment_maxima: tensor, vocab: tensor, origin: tensor,
    STOPS: constexpr, SPLIT: constexpr, SEGMENT: constexpr,
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
    sampled, filtered, inverse = kind[0], kind[1], kind[2]
    if position < tl.load(min_len + slot):
        x = mask_stops(x, first + places, stop_ids + slot * STOPS, STOPS)
    highest = tl.max(x, axis=0)
    place = row * tl.num_programs(0) + split
    if sampled:
        keys = row_keys(tl.load(seed + slot), position)
        reference = tl.where(highest > LOWEST, highest, 0.0)
        winner = _sampled_place(x, row_logits, keys, first, reference, inverse, SPLIT)
        if filtered:
            tl.store(masses + place, tl.sum(tl.exp((x - reference) * inverse), axis=0))
            segments = tl.max(tl.reshape(x, (SPLIT // SEGMENT, SEGMENT)), axis=1)
            tl.store(segment_maxima + place * (SPLIT // SEGMENT) + tl.arange(0, SPLIT // SEGMENT), segments)
    else:
        winner = tl.min(tl.where(x == highest, places, SPLIT - 1), axis=0)
    winner = tl.where(highest > LOWEST, winner, 0)  # always within the vocabulary
    tl.store(maxima + place, highest)
    tl.store(winners + place, first + winner)


@jit_varying("slots", "positions")
def _choose_kernel(
    logits: tensor, stride: tensor, slots: tensor, positions: tensor, parameters: tensor, stop_ids: tensor,
    winners: tensor, maxima: tensor, masses: tensor, segment_maxima: tensor, segment_lists: tensor, out: tensor,
    vocab: tensor, splits: tensor, STOPS: constexpr, SEGMENTS: constexpr, BLOCK_SPLITS: constexpr,
    BLOCK_SEGMENTS: constexpr, SHIFT: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row)
    seed, min_len = parameters[4], parameters[5]
    sampled, filtered, inverse, limit, p, min_p = row_kind(parameters, slot, vocab)
    split = tl.arange(0, BLOCK_SPLITS)
    exists = split < splits
    candidates = tl.load(winners + row * splits + split, mask=exists, other=0)
    tops = tl.load(maxima + row * splits + split, mask=exists, other=float("-inf"))
    top = tl.max(tops, axis=0)
    row_logits = logits + row.to(tl.int64) * stride
    keys = row_keys(tl.load(seed + slot), position)
    score = tops
    if sampled:
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
            segment_maxima + row * SEGMENTS, segment_lists + row * SEGMENTS, STOPS, SEGMENTS, BLOCK_SEGMENTS, SHIFT,
        )  # fmt: skip
    tl.store(out + row, winner)


def sample(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
    """A token for each of the rows `slots` of a table -> int32 (n,), as `core.sampler.sample` up to rounding of scores.

    logits (n, V) with contiguous rows, float32, float16 or bfloat16; table rows as the engine's device tables hold
    them; slots int32 or int64 (n,); positions int32 (n,) of the sampled tokens.
    """
    rows, vocab = logits.shape
    partial = empty_partial(rows, cdiv(vocab, SPLIT), SPLIT // SEGMENT, logits.device)
    split_winners(logits, table, slots, positions, partial, vocab, SPLIT)
    return choose(logits, table, slots, positions, partial, vocab)


# Results of the first launch: winners int32, maxima and masses float32 (n, splits), segment maxima float32.
Partial = tuple[Tensor, Tensor, Tensor, Tensor]


def empty_partial(rows: int, splits: int, split_segments: int, device: torch.device) -> Partial:
    winners = torch.empty((rows, splits), dtype=torch.int32, device=device)
    maxima, masses = torch.empty((2, rows, splits), dtype=torch.float32, device=device)
    return winners, maxima, masses, torch.empty((rows, splits * split_segments), dtype=torch.float32, device=device)


def split_winners(
    logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor, partial: Partial, vocab: int,
    split: int, origin: int = 0,
) -> None:  # fmt: skip
    """The first launch. Column 0 is token `origin`, a multiple of `split`; tokens from `vocab` on do not count."""
    rows, columns = logits.shape
    assert logits.stride(1) == 1
    if rows:
        _split_kernel[(cdiv(columns, split), rows)](
            logits, logits.stride(0), slots, positions, _parameters(table), table.stop_ids, *partial, vocab, origin,
            STOPS=table.stop_ids.shape[1], SPLIT=split, SEGMENT=SEGMENT, num_warps=max(1, SPLIT_WARPS * split // SPLIT),
        )  # fmt: skip


def choose(
    logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor, partial: Partial, vocab: int
) -> Tensor:
    """The second launch, over the first one's results and logits (n, at least vocab) -> tokens int32 (n,)."""
    (rows, splits), segments = partial[0].shape, partial[3].shape[1]
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows:
        segment_lists = torch.empty((rows, segments), dtype=torch.int32, device=logits.device)
        _choose_kernel[(rows,)](
            logits, logits.stride(0), slots, positions, _parameters(table), table.stop_ids, *partial, segment_lists,
            out, vocab, splits, STOPS=table.stop_ids.shape[1], SEGMENTS=segments,
            BLOCK_SPLITS=next_power_of_2(splits), BLOCK_SEGMENTS=next_power_of_2(segments),
            SHIFT=KEY_SHIFT[logits.dtype], num_warps=16,
        )  # fmt: skip
    return out


def _parameters(table: SamplingRows) -> tuple[Tensor, ...]:
    return table.temperature, table.top_p, table.min_p, table.top_k, table.seed, table.min_len
