"""Root mean square norm, alone and with the addition to the residual stream before it, each read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.jit import after_previous, jit_varying, launch_options, warps_for

MAX_DIM = 8192
TILE = 2048
"""Elements a program takes at least, when there are enough rows: narrow rows are taken several at a time."""
FILLING_ROWS = 2048
"""From this many rows on every multiprocessor has work even when a program takes several."""


@jit_varying("rows")
def _norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor, x_stride: tl.tensor, rows: tl.tensor,
    dim: tl.tensor, eps: tl.tensor,
    ADD: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < rows) & (column < dim)
    row = row.to(tl.int64)
    gain = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    stored = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if PARTS:
        whole = stored.to(tl.float32)
        for part in tl.static_range(1, PARTS):
            place = x + (part * rows + row) * dim + column
            whole += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        stored = whole.to(out.dtype.element_ty)
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
    """`reference.add_rms_norm`: residual += x in place, and the norm of the sum. x, residual (T, D) -> (T, D).

    x may be float32 (parts, T, D), contiguous: its parts are added up and rounded first (`linear.linear_parts`).
    """
    assert residual.is_contiguous()
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, dim = x.shape[-2:]
    parts = len(x) if x.dim() == 3 else 0
    assert dim <= MAX_DIM
    assert x.stride(-1) == 1
    assert not parts or x.is_contiguous()
    out = torch.empty((rows, dim), dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    if rows:
        pdl = launch_options()
        block = triton.next_power_of_2(dim)
        per_program = max(1, TILE // block) if rows >= FILLING_ROWS else 1
        _norm_kernel[(triton.cdiv(rows, per_program),)](
            x, residual, weight, out, x.stride(-2), rows, dim, eps,
            ADD=residual is not None, PARTS=parts, ROWS=per_program, BLOCK=block, PDL=bool(pdl),
            num_warps=warps_for(per_program * block), **pdl,
        )  # fmt: skip
    return out
