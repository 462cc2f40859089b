"""Matrix products for few rows, where the time is that of reading the weights and of starting.

A program takes a strip of the output's columns and, where that leaves multiprocessors idle, one of several parts of the
inner dimension. Before it waits for the kernel ahead of it (programmatic dependent launch) it asks the L2 cache for its
weights, which depend on nobody.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.activation import gated
from minisgl.gpu.kernels.jit import after_previous, jit, jit_varying, launch_options

MAX_ROWS = 64
"""From here on cuBLAS is as fast or faster, for `linear` and `gated_linear`."""
MAX_ROWS_PARTS = 128
"""The same for `linear_parts`."""
MAX_WEIGHTS = 8 << 20
LINE = 64
"""16-bit elements in a cache line of 128 bytes."""


class Tile(NamedTuple):
    """How a product is cut: output columns and inner elements a program takes at a time, parts of the inner sum."""

    columns: int
    inner: int
    parts: int
    warps: int
    stages: int


@jit
def _prefetch(weight: tl.tensor, row: tl.tensor, start: tl.tensor, inner: tl.tensor, COLUMNS: tl.constexpr,
              LENGTH: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr) -> None:  # fmt: skip
    lines = start + tl.minimum(tl.arange(0, LINES) * LINE, LENGTH - LINE)
    rows = row + tl.arange(0, COLUMNS)
    address = weight + rows[:, None].to(tl.int64) * inner + lines[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@jit_varying("rows")
def _linear_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    x_stride: tl.tensor, INNER: tl.constexpr, LENGTH: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr, LINES: tl.constexpr,
    LINE: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(0) * COLUMNS
    part = tl.program_id(1)
    start = part * LENGTH
    if PREFETCH:
        _prefetch(weight, first, start, INNER, COLUMNS, LENGTH, LINES, LINE)
        if GATED:
            _prefetch(weight, columns + first, start, INNER, COLUMNS, LENGTH, LINES, LINE)
    after_previous(PDL)
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    k = start + tl.arange(0, BLOCK)
    x_tile = x + row[:, None] * x_stride + k[None, :]
    w_tile = weight + column[None, :].to(tl.int64) * INNER + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, LENGTH, BLOCK):
        tile = tl.load(x_tile, mask=row[:, None] < rows, other=0.0)
        total = tl.dot(tile, tl.load(w_tile), total)
        if GATED:
            up = tl.dot(tile, tl.load(w_tile + columns * INNER), up)
        x_tile += BLOCK
        w_tile += BLOCK
    if BIAS:
        total += tl.load(bias + column).to(tl.float32)[None, :]
    if GATED:
        total = gated(total.to(x.dtype.element_ty), up.to(x.dtype.element_ty))
    place = out + (part * rows + row)[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row[:, None] < rows)


def fits(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether these kernels are the faster way to x (T, K) by weight (N, K) for up to `most` rows.

    Measured on an H200: from about 8 million weights on cuBLAS reads them as fast.
    """
    columns, inner = weight.shape
    return (
        x.shape[0] <= most
        and x.dtype in (torch.float16, torch.bfloat16)
        and columns % 128 == 0
        and inner % 512 == 0
        and weight.numel() <= MAX_WEIGHTS
    )


def padded_rows(rows: int) -> int:
    """Rows of a program's tile: 16 for `mma.sync`, else what `wgmma` takes at least, 64."""
    return 16 if rows <= 16 else max(64, triton.next_power_of_2(rows))


PARTS = Tile(32, 128, 4, 4, 5)
FEW = Tile(64, 256, 1, 4, 5)
MANY = Tile(32, 128, 1, 4, 5)
FEW_GATED = Tile(32, 256, 1, 4, 5)
MANY_GATED = Tile(32, 128, 1, 4, 4)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, columns: int, tile: Tile, gated: bool) -> None:
    rows, inner = x.shape
    pdl = launch_options()
    _linear_kernel[(columns // tile.columns, tile.parts)](
        x, weight, bias, out, rows, columns, x.stride(0), INNER=inner, LENGTH=inner // tile.parts,
        BIAS=bias is not None, GATED=gated, ROWS=padded_rows(rows), COLUMNS=tile.columns, BLOCK=tile.inner,
        PREFETCH=bool(pdl), LINES=triton.next_power_of_2(inner // tile.parts // LINE), LINE=LINE, PDL=bool(pdl),
        num_warps=tile.warps, num_stages=tile.stages, **pdl,
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None, out: Tensor | None = None
) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N), contiguous and, where it is given, `out`."""
    columns = weight.shape[0]
    tile = tile or (FEW if len(x) <= 16 else MANY)
    if out is None:
        out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, columns, tile, gated=False)
    return out


def linear_parts(x: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """x (T, K) by weight (N, K) as float32 sums over parts of K that are still to be added up -> (parts, T, N)."""
    columns = weight.shape[0]
    tile = tile or PARTS
    out = torch.empty((tile.parts, x.shape[0], columns), dtype=torch.float32, device=x.device)
    _launch(x, weight, None, out, columns, tile, gated=False)
    return out


def gated_linear(x: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """silu(x @ gate) * (x @ up), rounded where `silu_mul` rounds: x (T, K), weight (2I, K), gate first -> (T, I)."""
    columns = weight.shape[0] // 2
    tile = tile or (FEW_GATED if len(x) <= 16 else MANY_GATED)
    out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, out, columns, tile, gated=True)
    return out
