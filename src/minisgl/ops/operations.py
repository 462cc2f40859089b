"""Which implementation of the fused operations a device gets: plain torch, or the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from minisgl.ops import reference
from minisgl.ops.linear import linear
from minisgl.ops.sampling import SamplingRows, sample

MAX_FUSED_DIM = 8192


@dataclass(frozen=True)
class Operations:
    """The decoder's operations, each as its namesake in `ops/reference.py` describes it, and sampling.

    `linear(x, weight, bias)` is a product; `project` one whose result only `add_rms_norm` reads, and may be parts of a
    sum (parts, T, N); `gated(x, weight, bias)` the `silu_mul` of a product. `normed_linear` and `normed_gated` (x,
    residual, norm weight, eps, weight, bias) put `add_rms_norm` before them and return the residual stream too.
    `sample(logits, table, slots, positions, all_greedy, any_filter, any_min_len)` chooses tokens for rows of a table.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    project: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    normed_linear: Callable[[Tensor, Tensor, Tensor, float, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    normed_gated: Callable[[Tensor, Tensor, Tensor, float, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    rope_store_kv: Callable[
        [Tensor, Tensor | None, Tensor | None, float, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
    ]
    moe: Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
    sample: Callable[[Tensor, SamplingRows, Tensor, Tensor, bool, bool, bool], Tensor]


def _sample_plain(
    logits: Tensor,
    table: SamplingRows,
    slots: Tensor,
    positions: Tensor,
    all_greedy: bool,
    any_filter: bool,
    any_min_len: bool,
) -> Tensor:
    rows = table.select(slots)
    return sample(logits, rows, positions, all_greedy=all_greedy, any_filter=any_filter, any_min_len=any_min_len)


def _gated_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference.silu_mul(linear(x, weight, bias))


def _normed_linear_plain(
    x: Tensor, residual: Tensor, gain: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return linear(reference.add_rms_norm(x, residual, gain, eps), weight, bias), residual


def _normed_gated_plain(
    x: Tensor, residual: Tensor, gain: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _gated_plain(reference.add_rms_norm(x, residual, gain, eps), weight, bias), residual


PLAIN = Operations(
    name="torch",
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    linear=linear,
    project=linear,
    gated=_gated_plain,
    normed_linear=_normed_linear_plain,
    normed_gated=_normed_gated_plain,
    rope_store_kv=reference.rope_store_kv,
    moe=reference.moe,
    sample=_sample_plain,
)


def fused_operations() -> Operations:
    """The Triton kernels. What a row needs of sampling they find out on the device, so the flags are not looked at."""
    from minisgl.ops.kernels import activation, moe, norm, qkv, sampling
    from minisgl.ops.kernels import linear as small

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return small.linear(x, weight, bias) if small.fits(x, weight, small.MAX_ROWS) else linear(x, weight, bias)

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and small.fits(x, weight, small.MAX_ROWS_PARTS):
            return small.linear_parts(x, weight)
        return linear(x, weight, bias)

    def gated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and small.fits(x, weight, small.MAX_ROWS):
            return small.gated_linear(x, weight)
        return activation.silu_mul(linear(x, weight, bias))

    def normed_linear(
        x: Tensor, residual: Tensor, gain: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if small.fits(residual, weight, small.MAX_ROWS_NORMED):
            return small.normed_linear(x, residual, gain, eps, weight, bias)
        return product(norm.add_rms_norm(x, residual, gain, eps), weight, bias), residual

    def normed_gated(
        x: Tensor, residual: Tensor, gain: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if bias is None and small.fits(residual, weight, small.MAX_ROWS_NORMED):
            return small.normed_gated(x, residual, gain, eps, weight)
        return gated(norm.add_rms_norm(x, residual, gain, eps), weight, bias), residual

    return Operations(
        name="triton",
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        linear=product,
        project=project,
        gated=gated,
        normed_linear=normed_linear,
        normed_gated=normed_gated,
        rope_store_kv=qkv.rope_store_kv,
        moe=moe.moe,
        sample=lambda logits, table, slots, positions, *flags: sampling.sample(logits, table, slots, positions),
    )


def operations_for(device: torch.device, hidden_size: int) -> Operations:
    """The kernels on a GPU with triton, plain torch elsewhere and for models wider than the kernels take."""
    if device.type == "cuda" and hidden_size <= MAX_FUSED_DIM and find_spec("triton"):
        return fused_operations()
    return PLAIN
