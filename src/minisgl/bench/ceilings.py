"""The rates of a card that a floor is computed from, as a flag says them."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a card reaches at most: bytes/s of reading, flop/s of a large product in the model's dtype.

    `copy` is bytes/s of copying, reads and writes together; None where it was not measured.
    """

    read: float
    flops: float
    copy: float | None = None


def parse_ceilings(text: str) -> Ceilings:
    """`read=4.45e12,flops=790e12`, in bytes/s and flop/s."""
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        values = {name: float(value) for name, value in parts.items()}
    except ValueError:
        values = {}
    positive = all(math.isfinite(value) and value > 0 for value in values.values())
    if set(values) != {"read", "flops"} or not positive:
        raise argparse.ArgumentTypeError(f"{text!r} is not read=BYTES_PER_SECOND,flops=FLOPS_PER_SECOND")
    return Ceilings(**values)
