"""FP8 (e4m3; Micikevicius et al., arXiv 2209.05433): weights with scales, and their arithmetic in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128  # the side of a block of a weight, and the run of an activation, that share a scale


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight (N, K) in FP8, `data * scale`.

    `scale` float32 is (N, 1), one for each output channel, or (ceil(N / 128), ceil(K / 128)), one for each block.
    """

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def blocks(self) -> bool:
        return self.scale.shape != (len(self.data), 1)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        scale = self.scale.repeat_interleave(BLOCK, dim=0)[: len(self.data)] if self.blocks else self.scale
        return _spread(self.data.float(), scale).to(dtype)


Weight = Tensor | Fp8Weight


def quantize(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """x (T, K) in FP8, and its scales float32 (T, 1), or (T, ceil(K / group)); the largest value of each becomes 448.

    Rows of zeros have the scale 1.
    """
    width = x.shape[1]
    size = group or width
    padded = F.pad(x.float(), (0, -width % size)).view(len(x), -1, size)
    largest = padded.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    data = (padded / scale[:, :, None]).clamp(-FP8_MAX, FP8_MAX).view(len(x), -1)[:, :width]
    return data.to(FP8), scale


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """A weight (N, K), or a part of its columns, with a scale for each output channel."""
    return Fp8Weight(*quantize(weight))


def to_kv(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as the cache keeps them; what FP8 cannot hold becomes its largest number."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8) if dtype == FP8 else x


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x (T, K), quantised as the weight is, times a weight (N, K), plus bias (N,) -> (T, N); computed in float32."""
    data, scale = quantize(x, BLOCK if weight.blocks else None)
    out = F.linear(_spread(data.float(), scale), weight.dequantize(torch.float32))
    return (out if bias is None else out + bias).to(x.dtype)


def _spread(data: Tensor, scale: Tensor) -> Tensor:
    """data (N, K) times scale (N, 1) or (N, ceil(K / 128))."""
    return data * (scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, dim=1)[:, : data.shape[1]])
