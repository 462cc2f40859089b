"""How a step's rows go from one attention to the next: all at once, or in parts that take turns.

Between two attentions everything is done row by row. So what ends a block for some rows (a sum over ranks) can run
while the device computes for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""(residual (T, D), weight (D,), eps) -> (T, D): a norm of the residual stream, and what is done before it."""


@dataclass(frozen=True)
class Turns:
    """A step's T rows in parts, the first ones first.

    `add(x)` begins to add x, what a block computed for the rows of one part, to their residual stream. The norm that it
    returns ends that: it is `add_rms_norm` of x, and is called once, before the next `add` for these rows.
    """

    rows: Sequence[int]
    add: Callable[[Tensor], Norm]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x (T, ...) as each part's rows, which are views."""
        return (x,) if len(self.rows) == 1 else torch.split(x, list(self.rows))
