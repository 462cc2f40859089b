"""A grammar that is easy to foresee, and two that fail."""

import numpy as np
from numpy.typing import NDArray

from minisgl.core.types import Grammar


def cycle(width: int, length: int, millis: int = 0) -> Grammar:
    """An answer of `length` tokens, the i-th one of the `width` from 7 i on, and then the end.

    Two of three masks say that they took so many ms.
    """
    return Grammar(kind="regex", source=f"{width},{length},{millis}")


class Cycle:
    """Of the grammar "breaks" it raises at the fourth mask, of "refuses" it accepts no third token."""

    def __init__(self, grammar: Grammar, vocab_size: int, eos: int) -> None:
        self.fails = grammar.source if grammar.source in ("breaks", "refuses") else None
        numbers = (5, 100, 0) if self.fails else map(int, grammar.source.split(","))
        self.width, self.length, self.millis = numbers
        self.vocab_size = vocab_size
        self.eos = eos
        self.said = 0

    @property
    def seconds(self) -> float:
        return self.millis / 1000 if self.said % 3 else 0.0

    def allowed(self) -> list[int]:
        """The tokens that may come next; none but the end behind the last, and nothing at all behind that."""
        if self.said < self.length:
            return [(7 * self.said + i) % self.vocab_size for i in range(self.width)]
        return [self.eos] if self.said == self.length else []

    def fill(self, mask: NDArray[np.int32]) -> None:
        if self.fails == "breaks" and self.said == 3:
            raise RuntimeError("no fourth mask")
        bits = np.zeros(32 * len(mask), np.uint8)
        bits[self.vocab_size :] = 1  # not to be looked at
        bits[self.allowed()] = 1
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        ok = token in self.allowed() and not (self.fails == "refuses" and self.said == 2)
        self.said += 1
        return ok
