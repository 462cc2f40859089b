"""The counter-based noise of `core/sampler.py` as device functions: the same bits, the same Gumbel variates."""

from __future__ import annotations

import triton.language as tl

from minisgl.core.sampler import LARGEST_UNIFORM
from minisgl.gpu.kernels.jit import jit

LARGEST = tl.constexpr(LARGEST_UNIFORM)
SERIES_BELOW = tl.constexpr(0.0625)
"""Below this the exponential is taken from its power series: 1 - u has lost the digits of a small u."""


@jit
def row_keys(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The two 32-bit keys of a row, from its int64 seed and int32 position (SplitMix64's finaliser)."""
    key = seed.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB
    key = key ^ (key >> 31)
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@jit
def _multiplied(bits: tl.tensor) -> tl.tensor:
    bits = bits * 0x85EBCA6B
    return (bits ^ (bits >> 13)) * 0xC2B2AE35


@jit
def token_hash(keys: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """32 bits for each of int32 token ids, under a row's keys (MurmurHash3's finaliser, twice) -> uint32.

    x ^ (x >> 16) is linear and its own inverse: that which ends the first finaliser and that which begins the second
    leave of each other only what the second key adds between them, and a key's part is one scalar.
    """
    low, high = keys
    ids = tokens.to(tl.uint32, bitcast=True)
    bits = _multiplied(ids ^ (ids >> 16) ^ (low ^ (low >> 16)))
    bits = _multiplied(bits ^ (high ^ (high >> 16)))
    return bits ^ (bits >> 16)


@jit
def scaled_uniform(keys: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The hash as float32 in (0, 2^32]."""
    return token_hash(keys, tokens).to(tl.float32) + 0.5


@jit
def uniform(keys: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """The hash as float32 in (0, 1)."""
    return tl.minimum(scaled_uniform(keys, tokens) * (2.0**-32), LARGEST)


@jit
def exponential(u: tl.tensor) -> tl.tensor:
    """-log(1 - u), to 1e-6 of itself for every u of `uniform`; never below u."""
    # The series' next term is u^7 / 7, at most 9e-9 of the sum.
    sixth = 1.0 / 4 + u * (1.0 / 5 + u * (1.0 / 6))
    series = u * (1.0 + u * (1.0 / 2 + u * (1.0 / 3 + u * sixth)))
    return tl.where(u < SERIES_BELOW, series, -tl.log(1.0 - u))
