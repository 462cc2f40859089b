"""Weights on their way to the L2 cache while a kernel runs that leaves the memory idle.

A norm, an activation, or a sum over ranks takes microseconds in which no weight is read; the product that follows has
to wait for it, its weights do not. So more programs than it needs are launched, which ask the cache for the beginning
of each of the next weight's rows: what every program of a product reads first, whichever rows it takes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from minisgl.ops.kernels.jit import jit, launch_options

LINE_BYTES = 128
LINE = 64
"""16-bit elements in a cache line."""
LINES = 2048
"""Cache lines that a program asks for."""
MAX_ROWS = 256
"""From here on a product's time is that of its arithmetic."""
BYTES = 12 << 20
"""Asked for in all: what the memory delivers within some microseconds."""


class Ahead(NamedTuple):
    """What is fetched: the first `lines` cache lines of each of a weight's `rows` rows of `inner` elements."""

    rows: int
    inner: int
    lines: int
    programs: int


NOTHING = Ahead(0, 0, 0, 0)


def ahead_of(weight: Tensor | None, rows: int, limit: int | None = None) -> Ahead:
    """How to fetch a weight (N, K) for a product of so many rows, up to `limit` bytes; nothing where it is no use."""
    if weight is None or rows > MAX_ROWS or weight.dim() != 2 or weight.element_size() != 2 or not launch_options():
        return NOTHING
    columns, inner = weight.shape
    if inner % LINE or not weight.is_contiguous():
        return NOTHING
    lines = min(inner // LINE, (BYTES if limit is None else limit) // (LINE_BYTES * columns))
    return Ahead(columns, inner, lines, triton.cdiv(columns * lines, LINES))


@jit
def fetch(
    weight: tl.tensor, program: tl.tensor, rows: tl.tensor, inner: tl.tensor, lines: tl.tensor, LINES: tl.constexpr,
    LINE: tl.constexpr,
) -> None:  # fmt: skip
    """Ask for one program's share. It reads nothing that a kernel writes, and so waits for none."""
    tl.extra.cuda.gdc_launch_dependents()
    index = program * LINES + tl.arange(0, LINES)
    row = tl.minimum(index // lines, rows - 1)
    address = weight + row.to(tl.int64) * inner + index % lines * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
