"""The rotary embedding's angles as a table, for each kind of `Rope`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minisgl.models.rope import Rope


def rope_table(rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position's angles, scaled as yarn asks: float32 (max_positions, head_dim)."""
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(rope, head_dim))
    scale = yarn_attention_factor(rope) if rope.kind == "yarn" else 1.0
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * scale).to(device)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per token of each pair of dimensions: float32 (head_dim / 2,)."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, frequencies)
    return frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Meta's rule: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    rotations = rope.original_max_position * frequencies / (2 * math.pi)  # over the original context
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, kept.clamp(0.0, 1.0))


def _yarn(rope: Rope, head_dim: int, frequencies: Tensor) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.2): a linear ramp over dimensions instead of wavelengths."""

    def dimension(rotations: float) -> float:
        """The pair, as a real number, that turns this often over the original context."""
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return torch.lerp(frequencies, frequencies / rope.factor, stretched)


def yarn_attention_factor(rope: Rope) -> float:
    """What yarn scales cos and sin by, the square root of its attention temperature's inverse."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
