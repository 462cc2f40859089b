"""GEMMs for few rows, whose time goes into reading weights and into starting. Twins: `core.ops.linear`, `silu_mul`.

`linear` and its variants, for weights of up to 8 million elements: a thread block takes some of the output's columns
and, where that leaves multiprocessors idle, one of several splits of the inner dimension (split-K). Before it waits for
the previous kernel (PDL) it prefetches its weights into L2: no kernel writes those. `gemv`, for larger weights and one
row, uses no tensor cores: a thread block loads the first elements of its rows before it waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.gpu.kernels.elementwise import gated
from minisgl.gpu.kernels.jit import after_previous, cdiv, jit, jit_varying, launch_options, next_power_of_2, prefetch

HALF = (torch.float16, torch.bfloat16)
MAX_WEIGHTS = 8 << 20  # from about here on cuBLAS reads the weights as fast (H200)
MAX_ROWS = 64  # from here on cuBLAS is as fast or faster
MAX_SPLIT_K_ROWS = 128  # the same for `split_k_linear`
LINE = 64  # 16-bit elements in a cache line of 128 bytes
MAX_COLUMNS = 1 << 17  # larger weights are vocabularies, whose GEMMs are long enough for cuBLAS
GEMV_STEP = 256  # rows of the weight have a multiple of so many elements, so their addresses are aligned
MAX_GEMV_INNER = (1 << 15) - 1  # keeps the offset of a gated weight's second half within 32 bits


class GemvTile(NamedTuple):
    columns: int  # rows of the weight per thread block
    inner: int  # elements of each at a time
    warps: int


class LinearTile(NamedTuple):
    columns: int  # output columns per thread block
    inner: int  # elements of K at a time
    splits: int  # of K
    warps: int
    stages: int  # of the pipeline


SPLIT_K = LinearTile(32, 128, 4, 4, 5)
FEW = LinearTile(64, 256, 1, 4, 5)
MANY = LinearTile(32, 128, 1, 4, 5)
FEW_GATED = LinearTile(32, 256, 1, 4, 5)
MANY_GATED = LinearTile(32, 128, 1, 4, 4)


@jit_varying("rows")
def _linear_kernel(
    x: tensor, weight: tensor, bias: tensor, out: tensor, rows: tensor, columns: tensor, x_stride: tensor,
    INNER: constexpr, LENGTH: constexpr, BIAS: constexpr, GATED: constexpr, ROWS: constexpr, COLUMNS: constexpr,
    BLOCK: constexpr, PREFETCH: constexpr, LINES: constexpr, LINE: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(0) * COLUMNS
    part = tl.program_id(1)
    start = part * LENGTH
    if PREFETCH:
        prefetch(weight, first, start, INNER, COLUMNS, LENGTH, LINES, LINE)
        if GATED:
            prefetch(weight, columns + first, start, INNER, COLUMNS, LENGTH, LINES, LINE)
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


def fits_linear(x: Tensor, weight: Tensor, most: int) -> bool:
    """Whether x (T, K) by weight (N, K), T up to `most`, is faster here than with cuBLAS (measured on an H200)."""
    columns, inner = weight.shape
    small = len(x) <= most and weight.numel() <= MAX_WEIGHTS
    return small and x.dtype in HALF and columns % 128 == 0 and inner % 512 == 0


def _launch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: LinearTile) -> Tensor:
    (rows, inner), columns, options = x.shape, out.shape[-1], launch_options()
    padded = 16 if rows <= 16 else max(64, next_power_of_2(rows))  # `mma.sync` takes 16, `wgmma` at least 64
    _linear_kernel[(columns // tile.columns, tile.splits)](
        x, weight, bias, out, rows, columns, x.stride(0), INNER=inner, LENGTH=inner // tile.splits,
        BIAS=bias is not None, GATED=columns < len(weight), ROWS=padded, COLUMNS=tile.columns,
        BLOCK=tile.inner, PREFETCH=options["PDL"], LINES=next_power_of_2(inner // tile.splits // LINE),
        LINE=LINE, num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N).

    With `gated`, which takes no bias: `silu_mul` of x by weight (2I, K), gate first, with its roundings -> (T, I).
    """
    out = torch.empty((len(x), len(weight) // 2 if gated else len(weight)), dtype=x.dtype, device=x.device)
    few, many = (FEW_GATED, MANY_GATED) if gated else (FEW, MANY)
    return _launch_linear(x, weight, bias, out, few if len(x) <= 16 else many)


def split_k_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K) by weight (N, K) as float32 sums over splits of K -> (splits, T, N); `add_rms_norm` adds them up."""
    out = torch.empty((SPLIT_K.splits, len(x), len(weight)), dtype=torch.float32, device=x.device)
    return _launch_linear(x, weight, None, out, SPLIT_K)


@jit
def _gemv_kernel(
    x: tensor, weight: tensor, out: tensor, columns: tensor, INNER: constexpr, GATED: constexpr, COLUMNS: constexpr,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK)
    pointer = weight + column[:, None].to(tl.int64) * INNER + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.load(pointer, mask=k[None, :] < INNER, other=0.0, eviction_policy="evict_first")
    other = tile
    if GATED:
        other = tl.load(pointer + columns * INNER, mask=k[None, :] < INNER, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    up = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in range(0, INNER, BLOCK):
        row = tl.load(x + start + k, mask=start + k < INNER, other=0.0).to(tl.float32)[None, :]
        inside = (start + BLOCK + k < INNER)[None, :]
        next_tile = tl.load(pointer + start + BLOCK, mask=inside, other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * row
        tile = next_tile
        if GATED:
            next_tile = tl.load(
                pointer + columns * INNER + start + BLOCK, mask=inside, other=0.0, eviction_policy="evict_first"
            )
            up += other.to(tl.float32) * row
            other = next_tile
    result = tl.sum(total, axis=1)
    if GATED:
        result = gated(result.to(x.dtype.element_ty), tl.sum(up, axis=1).to(x.dtype.element_ty))
    tl.store(out + column, result.to(out.dtype.element_ty))


def fits_gemv(x: Tensor, weight: Tensor) -> bool:
    """Whether x (1, K) by weight (N, K) is faster here than with cuBLAS (measured on an H200)."""
    columns, inner = weight.shape
    fits = len(x) == 1 and weight.numel() > MAX_WEIGHTS and columns <= MAX_COLUMNS and inner <= MAX_GEMV_INNER
    divisible = columns % 16 == 0 and inner % GEMV_STEP == 0
    return fits and divisible and x.dtype in HALF and x.is_contiguous() and weight.is_contiguous()


def gemv_tile_for(inner: int, gated: bool) -> GemvTile:
    """The fastest measured on an H200 for rows of `inner` elements."""
    if gated:
        return GemvTile(1, 1024, 2)
    return GemvTile(1, 1024, 4) if 4096 <= inner <= 5120 else GemvTile(4, 512, 4)


def gemv(x: Tensor, weight: Tensor, gated: bool = False, tile: GemvTile | None = None) -> Tensor:
    """`linear` of one row without bias: x (1, K) by weight (N, K) -> (1, N), or with `gated` (2I, K) -> (1, I)."""
    columns = len(weight) // 2 if gated else len(weight)
    tile = tile or gemv_tile_for(x.shape[1], gated)
    out = torch.empty((1, columns), dtype=x.dtype, device=x.device)
    _gemv_kernel[(cdiv(columns, tile.columns),)](
        x, weight, out, columns, INNER=x.shape[1], GATED=gated, COLUMNS=tile.columns, BLOCK=tile.inner,
        num_warps=tile.warps, **launch_options(),
    )  # fmt: skip
    return out
