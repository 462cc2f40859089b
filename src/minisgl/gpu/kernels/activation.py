"""SwiGLU's gated activation in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.jit import after_previous, jit, launch_options, warps_for

BLOCK = 1024


@jit
def _silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr, PDL: tl.constexpr
) -> None:
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0)
    tl.store(out + row * width + column, gated(gate, up), mask=mask)


@jit
def gated(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """silu(gate) * up, with the reference's roundings: float32 inside, silu rounded to the dtype of the activations."""
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (silu * up.to(tl.float32)).to(gate.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_mul` of gate_up (T, 2I), contiguous, gate first -> (T, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        pdl = launch_options()
        block = min(BLOCK, triton.next_power_of_2(width))
        _silu_mul_kernel[(rows, triton.cdiv(width, block))](
            gate_up, out, width, BLOCK=block, PDL=bool(pdl), num_warps=warps_for(block), **pdl
        )
    return out
