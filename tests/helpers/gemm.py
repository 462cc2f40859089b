"""Operands of GEMMs, and how far a result is from what was wanted."""

import torch
import torch.nn.functional as F

from minisgl.core.quantization import BLOCK, FP8, FP8_MAX, Fp8Weight


def matrices(rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """x (rows, inner), a weight (columns, inner) that keeps its size, and a bias (columns,)."""
    torch.manual_seed(rows)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = (torch.randn(columns, inner, device=device) / inner**0.5).to(dtype)
    return [x, weight, torch.randn(columns, device=device).to(dtype)]


def in_blocks(weight: torch.Tensor) -> Fp8Weight:
    """A weight (..., N, K) with a scale for each block."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(*padded.shape[:-2], padded.shape[-2] // BLOCK, BLOCK, padded.shape[-1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(-3, -1)) / FP8_MAX
    data = (blocks / scale[..., :, None, :, None]).view(padded.shape)[..., :rows, :columns]
    return Fp8Weight(data.contiguous().to(FP8), scale)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, of what was wanted."""
    return float((got.float() - wanted).norm() / wanted.norm())
