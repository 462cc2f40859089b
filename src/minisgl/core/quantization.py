"""Weights in FP8 (e4m3; Micikevicius et al., arXiv 2209.05433) or int8 with scales, and their arithmetic in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl.core.model_config import FP8_BLOCK
from minisgl.errors import ConfigError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = FP8_BLOCK  # and the run of an activation that shares one
INT8_MAX, BYTE = 127.0, 256.0
MIDDLE = torch.tensor(BYTE * 128 + 128.5)  # bytes of 128, and a half, as conversion to integers cuts


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight (N, K) in FP8, `data * scale`, or those of experts (E, N, K).

    `scale` float32 is (…, N, 1), one for each output channel, or (…, ceil(N / 128), ceil(K / 128)), one for each block.
    """

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def blocks(self) -> bool:
        return self.scale.shape != (*self.data.shape[:-1], 1)

    def __getitem__(self, expert: int) -> Fp8Weight:
        return Fp8Weight(self.data[expert], self.scale[expert])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        rows, scale = self.data.shape[-2], self.scale
        spread = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :] if self.blocks else scale
        return _spread(self.data.float(), spread).to(dtype)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight (N, K) in int8, `data * scale`, in oneDNN's layout on the CPU; good for `int8_linear` only."""

    data: Tensor
    scale: Tensor  # float32 (N,), one for each output channel
    zeros: Tensor  # int64 (N,), which oneDNN asks for
    shape: torch.Size


Weight = Tensor | Fp8Weight | Int8Weight


@dataclass(frozen=True, eq=False)
class Fp8Rows:
    """Activations (T, K) in FP8, `data * scale`, as a GPU's kernels write them for a weight that reads them.

    `scale` float32 is (T, 1), or (T, K / 128), column by column, and then T is padded; `rows` counts those before that.
    """

    data: Tensor
    scale: Tensor
    rows: int
    dtype: torch.dtype  # of what they were, and of what is computed from them


Activations = Tensor | Fp8Rows


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


def quantize_fp8(weight: Tensor) -> Fp8Weight:
    """A weight (N, K), or a part of its columns, with a scale for each output channel; experts (E, N, K) in turn."""
    if weight.dim() == 2:
        return Fp8Weight(*quantize(weight))
    data = torch.empty_like(weight, dtype=FP8)
    scale = torch.empty((*weight.shape[:-1], 1), dtype=torch.float32, device=weight.device)
    for index, expert in enumerate(weight):
        data[index], scale[index] = quantize(expert)
    return Fp8Weight(data, scale)


def quantize_int8(weight: Tensor) -> Weight:
    """A weight (N, K), or a part of its columns, scaled by output channel; experts as they are. Raises ConfigError."""
    if not (torch._C._has_mkldnn and has_vnni()):
        raise ConfigError("--quantization int8 needs oneDNN in torch and an x86 CPU with VNNI instructions")
    if weight.dim() == 3:
        return weight
    largest = weight.abs().amax(dim=1).float()
    scale = torch.where(largest > 0, largest / INT8_MAX, 1.0)
    data = (weight.float() / scale[:, None]).round_().to(torch.int8)
    packed: Tensor = torch.ops.onednn.qlinear_prepack(data, None)
    return Int8Weight(packed, scale, torch.zeros(len(data), dtype=torch.int64), weight.shape)


def has_vnni() -> bool:
    """Whether the CPU has the instructions without which sums of two int8 products saturate."""
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return torch.cpu._is_vnni_supported() or found.get("avx_vnni", False)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x (T, K) times a weight (N, K), plus bias (N,) -> (T, N); a row's result does not depend on other rows.

    A row of x becomes integers of 16 bits, of which the products with low and high bytes are rows of one int8 GEMM:
    bytes alone change log-probabilities three times as much as the quantised weights do.
    """
    # An integer is 256 * high + low, and with 256 * 128 + 128 added its bytes are high + 128 and low + 128. A row of
    # zeros is divided by 0, and what that gives, whatever it is, multiplied by 0.
    x = x.float()
    largest, most = x.abs().amax(1, keepdim=True), INT8_MAX * BYTE  # (T, 1)
    integers = torch.addcdiv(MIDDLE, x, largest, value=most).to(torch.uint16)
    halves = integers.view(torch.uint8).view(-1, 2).t().reshape(-1, x.shape[1])  # (2T, K)
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        halves, 1.0 / most, 128, weight.data, weight.scale, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    out = torch.add(out[: len(x)], out[len(x) :], alpha=BYTE).mul_(largest)
    return out if bias is None else out.add_(bias)


def to_fp8(x: Tensor) -> Tensor:
    """In FP8, without a scale; what that cannot hold becomes its largest number."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x (T, K), quantised as the weight is, times a weight (N, K), plus bias (N,) -> (T, N); computed in float32."""
    data, scale = quantize(x, BLOCK if weight.blocks else None)
    out = F.linear(_spread(data.float(), scale), weight.dequantize(torch.float32))
    return (out if bias is None else out + bias).to(x.dtype)


def _spread(data: Tensor, scale: Tensor) -> Tensor:
    """data (…, K) times scale (…, 1) or (…, ceil(K / 128))."""
    return data * (scale if scale.shape[-1] == 1 else scale.repeat_interleave(BLOCK, dim=-1)[..., : data.shape[-1]])
