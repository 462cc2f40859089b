"""Tokens for segments, and how much of them a prefix cache without limits would know."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from minisgl.bench.online.sessions import Segment

GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def base(seed: int, key: tuple[str, int]) -> int:
    """Where the sequence of a segment begins."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key[0]}/{key[1]}".encode(), digest_size=8).digest())


def draw(seed: int, segments: Sequence[Segment], span: int) -> np.ndarray:
    """Numbers below `span`, one a token: int64[total]. A function of seed, key and place in the segment.

    The mixing is that of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    lengths = np.array([segment.length for segment in segments], np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = (np.arange(lengths.sum()) - starts + 1).astype(np.uint64)
    bases = np.repeat(np.array([base(seed, segment.key) for segment in segments], np.uint64), lengths)
    bits = bases + place * GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn: np.ndarray = (bits ^ (bits >> np.uint64(31))) % np.uint64(span)
    return drawn.astype(np.int64)


@dataclass
class Known:
    """A segment in the tree of all prompts so far: how far it was seen, and what followed its first n tokens."""

    length: int = 0
    after: dict[int, dict[tuple[str, int], Known]] = field(default_factory=dict)


def expected_hits(prompts: Iterable[Sequence[Segment]], page: int) -> list[int]:
    """For each prompt the tokens whose KV a cache that forgets nothing holds from those before it.

    Whole pages count, and never the last token: its logits must be computed.
    """
    root: dict[tuple[str, int], Known] = {}
    hits = []
    for segments in prompts:
        level, matched, matching = root, 0, True
        for segment in segments:
            known = level.setdefault(segment.key, Known())
            if matching:
                matched += min(known.length, segment.length)
                matching = known.length >= segment.length
            known.length = max(known.length, segment.length)
            level = known.after.setdefault(segment.length, {})
        total = sum(segment.length for segment in segments)
        hits.append(max(0, min(matched, total - 1)) // page * page)
    return hits
