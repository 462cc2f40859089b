"""A large weight by one row: the weights are read once, by plain loads, and added up without tensor cores.

A program takes some rows of the weight. It asks for their first elements before it waits for the kernel ahead
(programmatic dependent launch), as they depend on nobody.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.activation import gated
from minisgl.gpu.kernels.jit import jit, launch_options
from minisgl.gpu.kernels.linear import MAX_WEIGHTS

MAX_COLUMNS = 1 << 17
"""Beyond are vocabularies, whose products are long enough for cuBLAS."""
STEP = 256
"""A row of the weight has a multiple of so many elements, whose addresses then end in zeros."""
MAX_INNER = (1 << 15) - 1
"""So that half of a gated weight is not beyond 32 bits."""


class Cut(NamedTuple):
    """Rows of the weight a program takes, elements of each at a time, and its warps."""

    columns: int
    inner: int
    warps: int


@jit
def _gemv_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, columns: tl.tensor, INNER: tl.constexpr, GATED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK)
    place = weight + column[:, None].to(tl.int64) * INNER + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.load(place, mask=k[None, :] < INNER, other=0.0, eviction_policy="evict_first")
    other = tile
    if GATED:
        other = tl.load(place + columns * INNER, mask=k[None, :] < INNER, other=0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((COLUMNS, BLOCK), tl.float32)
    up = tl.zeros((COLUMNS, BLOCK), tl.float32)
    for start in range(0, INNER, BLOCK):
        row = tl.load(x + start + k, mask=start + k < INNER, other=0.0).to(tl.float32)[None, :]
        there = (start + BLOCK + k < INNER)[None, :]
        following = tl.load(place + start + BLOCK, mask=there, other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * row
        tile = following
        if GATED:
            following = tl.load(
                place + columns * INNER + start + BLOCK, mask=there, other=0.0, eviction_policy="evict_first"
            )
            up += other.to(tl.float32) * row
            other = following
    result = tl.sum(total, axis=1)
    if GATED:
        result = gated(result.to(x.dtype.element_ty), tl.sum(up, axis=1).to(x.dtype.element_ty))
    tl.store(out + column, result.to(out.dtype.element_ty))


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x (1, K) by weight (N, K) is for these kernels: measured faster than cuBLAS on an H200."""
    columns, inner = weight.shape
    return (
        x.shape[0] == 1
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.numel() > MAX_WEIGHTS
        and columns % 16 == 0
        and columns <= MAX_COLUMNS
        and inner % STEP == 0
        and inner <= MAX_INNER
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def gemv_cut(inner: int, gated: bool) -> Cut:
    """What was measured fastest on an H200 for weights whose rows have so many elements."""
    if gated:
        return Cut(1, 1024, 2)
    return Cut(1, 1024, 4) if 4096 <= inner <= 5120 else Cut(4, 512, 4)


def gemv(x: Tensor, weight: Tensor, out: Tensor | None = None, cut: Cut | None = None) -> Tensor:
    """x (1, K) by weight (N, K) -> (1, N), contiguous and, where it is given, `out`."""
    columns, inner = weight.shape
    if out is None:
        out = torch.empty((1, columns), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, columns, cut or gemv_cut(inner, gated=False), gated=False)
    return out


def gated_gemv(x: Tensor, weight: Tensor, cut: Cut | None = None) -> Tensor:
    """silu(x @ gate) * (x @ up), rounded where `silu_mul` rounds: x (1, K), weight (2I, K), gate first -> (1, I)."""
    columns, inner = weight.shape[0] // 2, weight.shape[1]
    out = torch.empty((1, columns), dtype=x.dtype, device=x.device)
    _launch(x, weight, out, columns, cut or gemv_cut(inner, gated=True), gated=True)
    return out


def _launch(x: Tensor, weight: Tensor, out: Tensor, columns: int, cut: Cut, gated: bool) -> None:
    pdl = launch_options()
    _gemv_kernel[(triton.cdiv(columns, cut.columns),)](
        x, weight, out, columns, INNER=weight.shape[1], GATED=gated, COLUMNS=cut.columns, BLOCK=cut.inner,
        PDL=bool(pdl), num_warps=cut.warps, **pdl,
    )  # fmt: skip
