"""GEMMs of activations, quantised row by row, and weights in FP8. Twin: `core.quantization.fp8_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.quantization import Fp8Rows, Fp8Weight, fp8_linear
from minisgl.gpu.kernels import fp8_rows
from minisgl.gpu.kernels.elementwise import in_runs, quantize_rows, quantizes_for
from minisgl.gpu.kernels.jit import after_previous, jit_varying, launch_options, prefetch
from minisgl.gpu.kernels.linear import MAX_WEIGHTS, LinearTile

MAX_ROWS = 64  # from here on cuBLAS is as fast or faster (H200)
LINE, AHEAD = 128, 512  # bytes of a cache line; of each row of a small weight that are prefetched


@jit_varying("rows")
def _linear_kernel(
    x: tensor, x_scale: tensor, weight: tensor, weight_scale: tensor, bias: tensor, out: tensor, rows: tensor,
    columns: tensor, INNER: constexpr, LENGTH: constexpr, BIAS: constexpr, ROWS: constexpr, COLUMNS: constexpr,
    BLOCK: constexpr, AHEAD: constexpr, LINE: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    # The weight is the first operand: `wgmma` takes 64 rows of it at least, and of the second as few as there are.
    part = tl.program_id(1)
    first, start = tl.program_id(0) * COLUMNS, part * LENGTH
    if AHEAD:
        prefetch(weight, first, start, INNER, COLUMNS, AHEAD, AHEAD // LINE, LINE)
    after_previous(PDL)
    row, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    k = start + tl.arange(0, BLOCK)
    x_tile = x + row[None, :] * INNER + k[:, None]
    w_tile = weight + column[:, None].to(tl.int64) * INNER + k[None, :]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for _ in range(0, LENGTH, BLOCK):
        total = tl.dot(tl.load(w_tile), tl.load(x_tile, mask=row[None, :] < rows, other=0.0), total)
        x_tile += BLOCK
        w_tile += BLOCK
    total *= tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :] * tl.load(weight_scale + column)[:, None]
    if BIAS:
        total += tl.load(bias + column).to(tl.float32)[:, None]
    place = out + (part * rows + row)[None, :].to(tl.int64) * columns + column[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=row[None, :] < rows)


def tile_for(rows: int, columns: int, inner: int, split: bool) -> LinearTile | None:
    """The fastest measured on an H200 of those that divide the weight."""
    few, large = rows <= 16, columns * inner > MAX_WEIGHTS
    if split and inner % 1024 == 0 and columns % 128 == 0 and (few or not large or inner > 8192):
        return LinearTile(128, 128, 4, 4, 4) if large and not few else LinearTile(64, 256, 4, 4, 3 if large else 4)
    if columns % 64 or inner % 256:
        return None
    if columns * inner > 64 << 20:
        return LinearTile(64, 256, 1, 4, 3) if few else LinearTile(64, 128, 1, 4, 5)
    return LinearTile(64, 256, 1, 4, 4)


def linear(x: Tensor | Fp8Rows, weight: Fp8Weight, bias: Tensor | None, split: bool = False) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N), or with `split` also float32 (splits, T, N)."""
    if isinstance(x, Tensor):
        if not quantizes_for(weight):
            return fp8_linear(x, weight, bias)
        x = quantize_rows(x, in_runs(len(x), weight))
    split = split and bias is None
    if fp8_rows.fits(x.rows, weight):
        return fp8_rows.linear(x, weight, bias, split)
    columns, inner = weight.shape
    tile = None if weight.blocks or x.rows > MAX_ROWS else tile_for(x.rows, columns, inner, split)
    if tile is not None:
        return _launch_linear(x, weight, bias, tile)
    if weight.blocks:
        recipe_x, recipe_weight = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    else:
        recipe_x = recipe_weight = F.ScalingType.RowWise
    out = F.scaled_mm(
        x.data, weight.data.t(), x.scale, recipe_x, weight.scale.t(), recipe_weight, output_dtype=x.dtype,
        use_fast_accum=not weight.blocks,
    )  # fmt: skip
    out = out[: x.rows]
    return out if bias is None else out + bias


def _launch_linear(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, tile: LinearTile) -> Tensor:
    rows, (columns, inner) = x.rows, weight.shape
    shape = (rows, columns) if tile.splits == 1 else (tile.splits, rows, columns)
    out = torch.empty(shape, dtype=x.dtype if tile.splits == 1 else torch.float32, device=x.data.device)
    options = launch_options()
    _linear_kernel[(columns // tile.columns, tile.splits)](
        x.data, x.scale, weight.data, weight.scale, bias, out, rows, columns, INNER=inner, LENGTH=inner // tile.splits,
        BIAS=bias is not None, ROWS=16 if rows <= 16 else 64, COLUMNS=tile.columns, BLOCK=tile.inner,
        AHEAD=min(AHEAD, inner // tile.splits) if options["PDL"] and columns * inner <= MAX_WEIGHTS else 0, LINE=LINE,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return out
