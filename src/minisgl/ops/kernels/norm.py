"""Root mean square norm, alone and with the addition to the residual stream before it, each read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.ops.kernels.jit import jit_varying, warps_for

MAX_DIM = 8192
TILE = 2048
"""Elements a program takes at least, when there are enough rows: narrow rows are taken several at a time."""
FILLING_ROWS = 2048
"""From this many rows on every multiprocessor has work even when a program takes several."""


@jit_varying("rows")
def _norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor, x_stride: tl.tensor, rows: tl.tensor,
    dim: tl.tensor, eps: tl.tensor,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < rows) & (column < dim)
    row = row.to(tl.int64)
    gain = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    stored = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if ADD:
        stream = residual + row * dim + column
        stored = (stored.to(tl.float32) + tl.load(stream, mask=mask, other=0.0).to(tl.float32)).to(stored.dtype)
        tl.store(stream, stored, mask=mask)
    wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / dim + eps)
    normed = (wide * scale[:, None]).to(stored.dtype).to(tl.float32) * gain
    tl.store(out + row * dim + column, normed.to(stored.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` of x (T, D), rows contiguous in themselves, weight (D,) -> (T, D). D up to 8192."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.add_rms_norm`: residual += x in place, and the norm of the sum. x, residual (T, D) -> (T, D)."""
    assert residual.is_contiguous()
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, dim = x.shape
    assert dim <= MAX_DIM
    assert x.stride(1) == 1
    out = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(dim)
        per_program = max(1, TILE // block) if rows >= FILLING_ROWS else 1
        _norm_kernel[(triton.cdiv(rows, per_program),)](
            x, residual, weight, out, x.stride(0), rows, dim, eps,
            ADD=residual is not None, ROWS=per_program, BLOCK=block, num_warps=warps_for(per_program * block),
        )  # fmt: skip
    return out
