"""What an answer must be, one token after the other: the engine's side of structured output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minisgl.errors import InvalidRequestError
from minisgl.types import Grammar


class Constraint(Protocol):
    """Follows one answer and says which tokens may come next.

    It allows the ids that end the text itself, where the text may end; it is not told of the stop token that ends the
    request. One that allows nothing ends the request as a stop token does. What either method raises ends only
    this request, with an error.
    """

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Overwrite every word of mask (ceil(V / 32),): bit t % 32 of word t // 32 says whether token t may be next.

        Bits past the vocabulary are not looked at.
        """

    def accept(self, token: int) -> bool:
        """Take in the token that was sampled; False when it was not allowed, which ends the request with an error."""


ConstraintFactory = Callable[[Grammar], Constraint]
"""Raises InvalidRequestError for a grammar that it cannot follow."""


def make_constraint(factory: ConstraintFactory | None, grammar: Grammar) -> Constraint:
    """A constraint for one answer. Raises InvalidRequestError when there is no factory or it refuses the grammar."""
    if factory is None:
        raise InvalidRequestError("this engine was built without structured output", param="grammar")
    try:
        return factory(grammar)
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(f"this {grammar.kind} cannot be followed: {error}", param="grammar") from error


def usable_words(masks: NDArray[np.int32], vocab_size: int) -> None:
    """Clear, in place, the bits of masks (g, ceil(V / 32)) that stand for no token."""
    if rest := vocab_size % 32:
        masks[:, -1] &= np.int32((1 << rest) - 1)


def forbid_tokens(mask: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
    """Clear the bits of these tokens, padded with -1, in one mask."""
    for token in tokens[tokens >= 0].tolist():
        mask[token // 32] &= np.int32(~(1 << token % 32) if token % 32 < 31 else 2**31 - 1)
