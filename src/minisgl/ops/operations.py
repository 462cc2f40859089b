"""Which implementation of the fused operations a device gets: plain torch, or the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from minisgl.ops import reference
from minisgl.ops.sampling import SamplingRows, sample

MAX_FUSED_DIM = 8192


@dataclass(frozen=True)
class Operations:
    """The decoder's operations, each as its namesake in `ops/reference.py` describes it, and sampling.

    `sample(logits, table, slots, positions, all_greedy, any_filter, any_min_len)` chooses tokens for rows of a table.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
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


PLAIN = Operations(
    name="torch",
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    silu_mul=reference.silu_mul,
    rope_store_kv=reference.rope_store_kv,
    moe=reference.moe,
    sample=_sample_plain,
)


def fused_operations() -> Operations:
    """The Triton kernels. What a row needs of sampling they find out on the device, so the flags are not looked at."""
    from minisgl.ops.kernels import activation, moe, norm, qkv, sampling

    return Operations(
        name="triton",
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        silu_mul=activation.silu_mul,
        rope_store_kv=qkv.rope_store_kv,
        moe=moe.moe,
        sample=lambda logits, table, slots, positions, *flags: sampling.sample(logits, table, slots, positions),
    )


def operations_for(device: torch.device, hidden_size: int) -> Operations:
    """The kernels on a GPU with triton, plain torch elsewhere and for models wider than the kernels take."""
    if device.type == "cuda" and hidden_size <= MAX_FUSED_DIM and find_spec("triton"):
        return fused_operations()
    return PLAIN
