"""Operands of GEMMs, and how far a result is from what was wanted."""

import torch


def matrices(rows: int, columns: int, inner: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """x (rows, inner), a weight (columns, inner) that keeps its size, and a bias (columns,)."""
    torch.manual_seed(rows)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = (torch.randn(columns, inner, device=device) / inner**0.5).to(dtype)
    return [x, weight, torch.randn(columns, device=device).to(dtype)]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, of what was wanted."""
    return float((got.float() - wanted).norm() / wanted.norm())
