"""Which implementation of the fused operations a device gets: plain torch, or kernels."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from minisgl.core.ops import PLAIN, Operations, _embed, _whole, linear, linear_into
from minisgl.core.sampler import SamplingRows

MAX_FUSED_DIM = 8192


def fused_operations(device: torch.device) -> Operations:
    """The kernels. What a row needs of sampling they find out on the device, so the flags are not looked at."""
    from minisgl.gpu.kernels import activation, gemv, moe, norm, qkv, sampling, stream
    from minisgl.gpu.kernels import linear as small

    against = stream.trial(device)

    def streams(x: Tensor, weight: Tensor) -> bool:
        return not against and stream.fits(x, weight)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        if small.fits(x, weight, small.MAX_ROWS):
            return small.linear(x, weight, bias, out=out)
        if bias is None and gemv.fits(x, weight):
            return gemv.gemv(x, weight, out)
        if streams(x, weight):
            return stream.linear(x, weight, bias, out)
        if out is None:
            return linear(x, weight, bias)
        linear_into(x, weight, bias, out)
        return out

    def product_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        product(x, weight, bias, out)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and small.fits(x, weight, small.MAX_ROWS_PARTS):
            return small.linear_parts(x, weight)
        return product(x, weight, bias)

    def gated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and small.fits(x, weight, small.MAX_ROWS):
            return small.gated_linear(x, weight)
        if bias is None and gemv.fits(x, weight):
            return gemv.gated_gemv(x, weight)
        if bias is None and streams(x, weight):
            return stream.gated_linear(x, weight)
        return activation.silu_mul(linear(x, weight, bias))

    def choose(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor, *flags: bool) -> Tensor:
        return sampling.sample(logits, table, slots, positions)

    return Operations(
        name=f"triton; no CUDA C++: {against}" if against else "triton and CUDA C++",
        embed=_embed,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        linear=product,
        linear_into=product_into,
        project=project,
        gated=gated,
        rope_store_kv=qkv.rope_store_kv,
        moe=moe.moe,
        whole_logits=_whole,
        sample=choose,
        sample_whole=choose,
    )


def operations_for(device: torch.device, hidden_size: int) -> Operations:
    """The kernels on a GPU with triton, plain torch elsewhere and for models wider than the kernels take."""
    if device.type == "cuda" and hidden_size <= MAX_FUSED_DIM and find_spec("triton"):
        return fused_operations(device)
    return PLAIN
