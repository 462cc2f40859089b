"""Products of activations that are quantised row by row with weights in FP8. Twin: `core.quantization.fp8_linear`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.quantization import BLOCK, FP8, FP8_MAX, Fp8Weight, fp8_linear
from minisgl.gpu.kernels.jit import after_previous, jit_varying, launch_options, warps_for
from minisgl.gpu.kernels.linear import LinearTile

MAX_ROWS = 64  # from here on cuBLAS is as fast or faster (H200)
ALIGNMENT = 16  # of both dimensions, for cuBLAS
BLOCK_ALIGNMENT = 4 * BLOCK  # of the inner one with blocks: their scales must be whole groups of four
ROW_STEP = 4  # with blocks, rows are padded to a multiple
TILE = 8192  # elements of a row that a thread block holds at a time


@dataclass(frozen=True)
class Fp8Rows:
    """Activations (T, K) in FP8; `scale` float32 is (T, 1), or (T, K / 128), column by column, T padded."""

    data: Tensor
    scale: Tensor


@jit_varying("padded")
def _quantize_kernel(
    x: tensor, data: tensor, scale: tensor, x_stride: tensor, padded: tensor, width: tensor, GROUP: constexpr,
    BLOCK: constexpr, MAX: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * GROUP
    end = tl.minimum(first + GROUP, width)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        largest = tl.maximum(
            largest, tl.abs(tl.load(x + row * x_stride + column, mask=column < end, other=0.0).to(tl.float32))
        )
    top = tl.max(largest, axis=0)
    step = tl.where(top > 0, top / MAX, 1.0)
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        wide = tl.load(x + row * x_stride + column, mask=column < end, other=0.0).to(tl.float32) / step
        tl.store(data + row * width + column, tl.clamp(wide, -MAX, MAX).to(data.dtype.element_ty), mask=column < end)
    tl.store(scale + group * padded + row, step)


def quantize_rows(x: Tensor, blocks: bool = False) -> Fp8Rows:
    """x (T, K) with contiguous rows; with `blocks` every 128 values of a row have a scale. Twin: `quantize`."""
    rows, width = x.shape
    group = BLOCK if blocks else width
    groups, padded = triton.cdiv(width, group), -(-rows // ROW_STEP) * ROW_STEP if blocks else rows
    data = torch.empty((padded, width), dtype=FP8, device=x.device)
    scale = torch.empty((groups, padded), dtype=torch.float32, device=x.device).t()
    if rows:
        block = min(TILE, triton.next_power_of_2(group))
        _quantize_kernel[(rows, groups)](
            x, data, scale, x.stride(0), padded, width, GROUP=group, BLOCK=block, MAX=FP8_MAX,
            num_warps=warps_for(block), **launch_options(),
        )  # fmt: skip
    return Fp8Rows(data, scale)


@jit_varying("rows")
def _linear_kernel(
    x: tensor, x_scale: tensor, weight: tensor, weight_scale: tensor, bias: tensor, out: tensor, rows: tensor,
    columns: tensor, INNER: constexpr, LENGTH: constexpr, BIAS: constexpr, ROWS: constexpr, COLUMNS: constexpr,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    part = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = part * LENGTH + tl.arange(0, BLOCK)
    x_tile = x + row[:, None] * INNER + k[None, :]
    w_tile = weight + column[None, :].to(tl.int64) * INNER + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, LENGTH, BLOCK):
        total = tl.dot(tl.load(x_tile, mask=row[:, None] < rows, other=0.0), tl.load(w_tile), total)
        x_tile += BLOCK
        w_tile += BLOCK
    total *= tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None] * tl.load(weight_scale + column)[None, :]
    if BIAS:
        total += tl.load(bias + column).to(tl.float32)[None, :]
    place = out + (part * rows + row)[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row[:, None] < rows)


def tile_for(rows: int, columns: int, inner: int, split: bool) -> LinearTile | None:
    """The fastest measured on an H200 of those that divide the weight."""
    if split and inner % 1024 == 0 and columns % 32 == 0 and (rows <= 16 or inner <= 4096):
        return LinearTile(32, 256, 4, 4, 3)
    if columns % 64 or inner % 256:
        return None
    if columns * inner > 64 << 20:
        return LinearTile(64, 256, 1, 4, 3) if rows <= 16 else LinearTile(64, 128, 1, 4, 5)
    return LinearTile(32, 256, 1, 4, 4)


def linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None, split: bool = False) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N), or with `split` also float32 (splits, T, N)."""
    (rows, inner), columns = x.shape, len(weight.data)
    if columns % (BLOCK if weight.blocks else ALIGNMENT) or inner % (BLOCK_ALIGNMENT if weight.blocks else ALIGNMENT):
        return fp8_linear(x, weight, bias)
    quantized = quantize_rows(x, weight.blocks)
    tile = None if weight.blocks or rows > MAX_ROWS else tile_for(rows, columns, inner, split and bias is None)
    if tile is not None:
        return _launch_linear(quantized, weight, bias, tile, x.dtype)
    if weight.blocks:
        recipe_x, recipe_weight = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    else:
        recipe_x = recipe_weight = F.ScalingType.RowWise
    out = F.scaled_mm(
        quantized.data, weight.data.t(), quantized.scale, recipe_x, weight.scale.t(), recipe_weight,
        output_dtype=x.dtype,
        use_fast_accum=not weight.blocks,
    )  # fmt: skip
    out = out[:rows]
    return out if bias is None else out + bias


def _launch_linear(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, tile: LinearTile, dtype: torch.dtype) -> Tensor:
    (rows, inner), columns = x.data.shape, len(weight.data)
    shape = (rows, columns) if tile.splits == 1 else (tile.splits, rows, columns)
    out = torch.empty(shape, dtype=dtype if tile.splits == 1 else torch.float32, device=x.data.device)
    _linear_kernel[(columns // tile.columns, tile.splits)](
        x.data, x.scale, weight.data, weight.scale, bias, out, rows, columns, INNER=inner, LENGTH=inner // tile.splits,
        BIAS=bias is not None, ROWS=16 if rows <= 16 else 64, COLUMNS=tile.columns, BLOCK=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(),
    )  # fmt: skip
    return out
