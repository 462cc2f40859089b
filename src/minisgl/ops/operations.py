"""Which implementation of the fused operations a device gets: plain torch, or kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from minisgl.ops import reference
from minisgl.ops.linear import linear, linear_into
from minisgl.ops.sampling import SamplingRows, sample
from minisgl.ops.turns import Turns

MAX_FUSED_DIM = 8192
Sample = Callable[[Tensor, SamplingRows, Tensor, Tensor, bool, bool, bool], Tensor]


@dataclass(frozen=True)
class Operations:
    """The decoder's operations, each as its namesake in `ops/reference.py` describes it, and sampling.

    `embed(ids, table, whole)` begins a forward pass, which is `whole` when the hidden states of all its tokens are
    wanted. `linear(x, weight, bias)` is a product; `project` one whose result only `add_rms_norm` reads, and may be
    parts of a sum (parts, T, N); `gated(x, weight, bias)` the `silu_mul` of a product.
    `linear_into(x, weight, bias, out)` writes a product to `out`. On one rank of several logits are those of its own
    tokens: `sample(logits, table, slots, positions, all_greedy, any_filter, any_min_len)` chooses tokens from them for
    rows of a table; `whole_logits` makes them those of all tokens, on all ranks alike, and `sample_whole` chooses from
    such. `cut(residual)` says in which parts a step's rows take turns between attentions; None: all go at once.
    """

    name: str
    embed: Callable[[Tensor, Tensor, bool], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    linear_into: Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
    project: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gated: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rope_store_kv: Callable[
        [Tensor, Tensor | None, Tensor | None, float, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor
    ]
    moe: Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
    whole_logits: Callable[[Tensor], Tensor]
    sample: Sample
    sample_whole: Sample
    cut: Callable[[Tensor], Turns | None] = lambda residual: None

    def turns(self, residual: Tensor) -> Turns:
        """The parts of the rows of a residual stream (T, D)."""
        return self.cut(residual) or Turns((len(residual),), partial(partial, self.add_rms_norm))


def _embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
    return table.index_select(0, ids)


def _whole(logits: Tensor) -> Tensor:
    return logits


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


PLAIN = Operations(
    name="torch",
    embed=_embed,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    linear=linear,
    linear_into=linear_into,
    project=linear,
    gated=lambda x, weight, bias: reference.silu_mul(linear(x, weight, bias)),
    rope_store_kv=reference.rope_store_kv,
    moe=reference.moe,
    whole_logits=_whole,
    sample=_sample_plain,
    sample_whole=_sample_plain,
)


def fused_operations(device: torch.device) -> Operations:
    """The kernels. What a row needs of sampling they find out on the device, so the flags are not looked at."""
    from minisgl.ops.kernels import activation, gemv, moe, norm, qkv, sampling, stream
    from minisgl.ops.kernels import linear as small

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
