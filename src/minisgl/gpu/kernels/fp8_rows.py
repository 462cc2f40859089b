"""GEMMs of up to 8 rows and an FP8 weight, at the GPU's memory bandwidth. Twin: `core.quantization.fp8_linear`.

The kernel is CUDA C++ (`fp8_rows.cu`): Triton waits for each of the products that are scaled one by one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minisgl.core.quantization import BLOCK, FP8, Fp8Rows, Fp8Weight
from minisgl.gpu.kernels.cuda import MULTIPROCESSORS, CudaKernel, available, compile_all, defines

TILE = 16  # rows of the weight that a thread block takes
MAX_ROWS = 8  # above it the kernel of `fp8`, or cuBLAS, is faster


class RowsTile(NamedTuple):
    warps: int
    ahead: int  # runs of 128 elements that a warp has on their way
    resident: int  # thread blocks per multiprocessor
    splits: int  # of K


LONG, WIDE = RowsTile(8, 2, 3, 1), RowsTile(4, 4, 4, 1)
TILES = (LONG, WIDE)


def tile_for(columns: int, split: bool) -> RowsTile:
    """The fastest measured on an H200, or nearly: one wave of thread blocks where it can be."""
    tiles = columns // TILE
    if tiles < MULTIPROCESSORS:
        return WIDE._replace(splits=4 if split else 1)
    return WIDE if 384 <= tiles <= WIDE.resident * MULTIPROCESSORS else LONG


def source(tile: RowsTile, blocks: bool, split: bool, dtype: torch.dtype) -> str:
    constants = defines(
        WARPS=tile.warps, AHEAD=tile.ahead, RESIDENT=tile.resident, BLOCKS=blocks, PARTS=split,
        FLOAT16=dtype == torch.float16,
    )  # fmt: skip
    return constants + Path(__file__).with_name("fp8_rows.cu").read_text()


@functools.cache
def kernel(tile: RowsTile, blocks: bool, split: bool, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    sources = [source(other, blocks, sums, dtype) for other in TILES for sums in (False, True)]
    compile_all(sources)  # a decoder needs most of them
    with torch.cuda.device(device):
        return CudaKernel(source(tile, blocks, split, dtype), "fp8_rows", 0)


def fits(rows: int, weight: Fp8Weight) -> bool:
    columns, inner = weight.shape
    return rows <= MAX_ROWS and columns % TILE == 0 and inner % BLOCK == 0 and not trial(weight.data.device)


def linear(x: Fp8Rows, weight: Fp8Weight, bias: Tensor | None, split: bool, tile: RowsTile | None = None) -> Tensor:
    """x (T, K), with a scale for each run of 128, by weight (N, K), plus bias (N,) -> (T, N).

    With `split` the result is float32 (splits, T, N), sums to be added up, without bias.
    """
    columns, inner = weight.shape
    tile = tile or tile_for(columns, split)
    shape = (tile.splits, x.rows, columns) if split else (x.rows, columns)
    out = torch.empty(shape, dtype=torch.float32 if split else x.dtype, device=x.data.device)
    kernel(tile, weight.blocks, split, x.dtype, x.data.device).launch(
        columns // TILE * tile.splits, 32 * tile.warps,
        (x.data, x.scale, weight.data, weight.scale, bias, out, x.rows, len(x.data), columns, inner),
    )  # fmt: skip
    return out


@functools.cache
def trial(device: torch.device) -> str:
    """Try the kernel on a small GEMM -> why it cannot be used on this device, or ""."""
    if why := available(device):
        return why
    x = Fp8Rows(torch.ones((4, 256), device=device).to(FP8), torch.ones((2, 4), device=device).t(), 1, torch.bfloat16)
    weight = Fp8Weight(torch.ones((TILE, 256), device=device).to(FP8), torch.ones((TILE, 1), device=device))
    try:
        right = bool((linear(x, weight, None, split=False) == 256).all())
    except Exception as error:  # whatever it is, other kernels still work
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if right else "a GEMM was wrong"
