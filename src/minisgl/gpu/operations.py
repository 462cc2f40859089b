"""Which kernel computes what: the operations of a GPU, and which GEMM kernel takes which shape."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from minisgl.core.ops import PLAIN, Operations
from minisgl.core.ops import linear as cublas_linear
from minisgl.core.quantization import Activations, Fp8Weight, Weight

MAX_FUSED_DIM = 8192


def operations_for(device: torch.device, hidden_size: int) -> Operations:
    """The kernels on a GPU with triton; plain torch on other devices and for models wider than the kernels take."""
    if device.type == "cuda" and hidden_size <= MAX_FUSED_DIM and find_spec("triton"):
        return fused_operations(device)
    return PLAIN


def fused_operations(device: torch.device) -> Operations:
    """The kernels. GEMMs of x (T, K) and a weight (N, K) in 16 bits take the first line that fits:

    | T           | N * K         | kernel                                                            |
    | up to 64    | up to 8M      | `linear`; up to 128 rows `split_k_linear` before an add_rms_norm  |
    | 1           | more than 8M  | `gemv`                                                            |
    | 2 to 96     | more than 8M  | `stream`, on Hopper                                               |
    | any         | any           | cuBLAS                                                            |
    """
    from minisgl.gpu.kernels import elementwise, fp8, linear, moe, sampling, stream

    no_stream = stream.trial(device)

    def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> Tensor | None:
        """By the first of our kernels that fits; None where it is for cuBLAS."""
        if gated and bias is not None:  # which they would have to add before the activation
            return None
        if linear.fits_linear(x, weight, linear.MAX_ROWS):
            return linear.linear(x, weight, bias, gated)
        if bias is None and linear.fits_gemv(x, weight):
            return linear.gemv(x, weight, gated)
        if not no_stream and stream.fits(x, weight):
            return stream.linear(x, weight, bias, gated)
        return None

    def fused_linear(x: Activations, weight: Weight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, Fp8Weight):
            return fp8.linear(x, weight, bias)
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)  # int8 is for the CPU
        out = few_rows(x, weight, bias, gated=False)
        return cublas_linear(x, weight, bias) if out is None else out

    def row_parallel_linear(x: Activations, weight: Weight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, Fp8Weight):
            return fp8.linear(x, weight, bias, split=True)
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)
        if bias is None and linear.fits_linear(x, weight, linear.MAX_SPLIT_K_ROWS):
            return linear.split_k_linear(x, weight)
        return fused_linear(x, weight, bias)

    def gated_linear(x: Activations, weight: Weight, bias: Tensor | None, reader: Weight | None) -> Any:
        if isinstance(weight, Fp8Weight):
            return elementwise.silu_mul(fp8.linear(x, weight, bias), reader)
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)
        out = few_rows(x, weight, bias, gated=True)
        return elementwise.silu_mul(cublas_linear(x, weight, bias), reader) if out is None else out

    return dataclasses.replace(
        PLAIN,
        name=f"triton; no CUDA C++: {no_stream}" if no_stream else "triton and CUDA C++",
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        linear=fused_linear,
        row_parallel_linear=row_parallel_linear,
        gated_linear=gated_linear,
        rope_store_kv=elementwise.rope_store_kv,
        moe=moe.moe,
        sample=sampling.sample,
        sample_gathered=sampling.sample,
    )
