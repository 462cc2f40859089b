"""The decoder's operations in plain torch: what the CPU runs, and every kernel's reference.

T tokens, D hidden size, N heads, hd head size, I MLP width, E experts. Reductions and rotations are in float32 whatever
the dtype of the arguments, and results have the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl.core.quantization import FP8, Fp8Weight, Int8Weight, Weight, fp8_linear, int8_linear, quantize_int8, to_fp8
from minisgl.core.sampler import SamplingRows, sample

TYPICAL_ROWS = 8  # of the activation that a packed weight is laid out for; layouts differ little from 2 to 512
# Above EXACT_ROWS a packed GEMM is padded to a multiple of ROW_STEP: oneDNN compiles and keeps a program for each
# number of rows, 2 MB for a small model's five shapes, which came to 1 GB for all numbers up to 512.
EXACT_ROWS, ROW_STEP = 64, 16


def embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
    """Rows of a table: ids int32 (T,), table (V, D) -> (T, D). `whole` is read by other implementations only."""
    return table.index_select(0, ids)


def rms_norm(x: Tensor, weight: Tensor, eps: float, reader: Weight | None = None) -> Tensor:
    """Root mean square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    x (..., D), weight (D,) -> (..., D). The normalised value is rounded to the dtype of x before it is scaled.
    """
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Weight | None = None) -> Tensor:
    """Add x to the residual stream in place, and return the stream's `rms_norm`. x, residual (T, D)."""
    residual += x
    return rms_norm(residual, weight, eps)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x (T, in) times a weight (out, in), packed, quantised or plain, plus bias (out,) -> (T, out)."""
    if isinstance(weight, Fp8Weight):
        return fp8_linear(x, weight, bias)
    if isinstance(weight, Tensor) and not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if lacking := -rows % ROW_STEP if rows > EXACT_ROWS else 0:
        x = F.pad(x, (0, 0, 0, lacking))
    if isinstance(weight, Int8Weight):
        return int8_linear(x, weight, bias)[:rows].to(x.dtype)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out[:rows]


def silu_mul(gate_up: Tensor) -> Tensor:
    """The gated activation of SwiGLU (Shazeer, arXiv 2002.05202). gate_up (..., 2I), gate first -> (..., I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gated_linear(x: Tensor, weight: Weight, bias: Tensor | None, reader: Weight | None = None) -> Tensor:
    """`silu_mul` of a `linear`: x (T, in), weight (2I, in), bias (2I,) -> (T, I)."""
    return silu_mul(linear(x, weight, bias))


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate heads by their token's angles, pairing dimension i with i + hd/2 (RoFormer, arXiv 2104.09864).

    x (T, N, hd); cos_sin float32 (T, hd), the hd/2 cosines first -> (T, N, hd).
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # (T, 1, hd/2)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    low, high = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return rotated.to(x.dtype)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write keys and values of T tokens to their places in one layer's pages.

    k, v (T, K, hd); k_cache, v_cache (pages, page_size, K, hd); slot_mapping int64 (T,) = page * page_size + offset.
    """
    for cache, new in ((k_cache, k), (v_cache, v)):
        # As bytes where it is FP8, which torch does not index.
        kept = to_fp8(new).view(torch.uint8) if cache.dtype == FP8 else new
        cache.view(kept.dtype).view(-1, *new.shape[1:]).index_copy_(0, slot_mapping, kept)


class RopeStore(NamedTuple):
    """A `rope_store_kv`, and what one layer and step give it beside qkv."""

    operation: Callable[[Tensor, RopeStore, Tensor | None], Tensor]
    q_norm: Tensor | None  # (hd,), as the next
    k_norm: Tensor | None
    eps: float
    cos_sin: Tensor  # float32 (max_seq_len, hd), cosines first
    positions: Tensor  # int32 (T,)
    slot_mapping: Tensor  # int64 (T,) = page * page_size + offset; kernels take int32 too
    k_cache: Tensor  # one layer's (pages, page_size, K, hd), as the next
    v_cache: Tensor

    def __call__(self, qkv: Tensor, out: Tensor | None = None) -> Tensor:
        return self.operation(qkv, self, out)


def rope_store_kv(qkv: Tensor, rope: RopeStore, out: Tensor | None = None) -> Tensor:
    """Norm each head of q and k where there are weights, rotate them, store k and v in one layer's pages; return q.

    qkv (T, (H + 2K) * hd), bias added -> (T, H, hd), `out` where it is given.
    """
    kv_heads, head_dim = rope.k_cache.shape[2:]
    parts = qkv.view(len(qkv), -1, head_dim)
    heads = parts.shape[1] - 2 * kv_heads
    angles = rope.cos_sin.index_select(0, rope.positions)  # (T, hd)
    if rope.q_norm is not None and rope.k_norm is not None:
        q = apply_rope(rms_norm(parts[:, :heads], rope.q_norm, rope.eps), angles)
        k = apply_rope(rms_norm(parts[:, heads:-kv_heads], rope.k_norm, rope.eps), angles)
    else:
        q, k = apply_rope(parts[:, :-kv_heads], angles).tensor_split([heads], dim=1)
    store_kv(k, parts[:, -kv_heads:], rope.k_cache, rope.v_cache, rope.slot_mapping)
    return q if out is None else out.copy_(q)


def moe(
    x: Tensor, router: Tensor, expert_gate_up: Tensor | Fp8Weight, expert_down: Tensor | Fp8Weight, top_k: int,
    norm_topk_prob: bool,
) -> Tensor:  # fmt: skip
    """A sparse SwiGLU layer: each token goes through its `top_k` experts, weighted by the router's softmax.

    x (T, D), router (E, D), expert_gate_up (E, 2I, D), expert_down (E, D, I) -> (T, D). The softmax is float32 over all
    experts; `norm_topk_prob` scales the chosen probabilities to sum 1. The host waits for the device.
    """
    probs = F.linear(x, router).float().softmax(dim=-1)
    weights, chosen = probs.topk(top_k, dim=-1)  # (T, top_k)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    weights = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, rank = torch.where(chosen == expert)
        hidden = linear(silu_mul(linear(x[tokens], expert_gate_up[expert])), expert_down[expert])
        out.index_add_(0, tokens, hidden * weights[tokens, rank, None])
    return out


def sample_slots(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
    return sample(logits, table.select(slots), positions)


Linear = Callable[[Any, Weight, Tensor | None], Tensor]  # of `Activations` that the implementation itself made
Sample = Callable[[Tensor, SamplingRows, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operations:
    """What a decoder and its sampler call: functions of this module, or others that compute the same in their place.

    `embed` begins a forward pass; `whole`: the hidden states of all its tokens are wanted. Only `add_rms_norm` reads
    the result of `row_parallel_linear` and `moe`, which may be parts of a sum (parts, T, D). The last argument of the
    norms and of `gated_linear` is the weight that reads their result: kernels may quantise the result for it. With
    tensor parallelism `sample` takes a rank's own logits; `gather_logits` makes those of all tokens of them, for
    `sample_gathered`.
    """

    name: str = "torch"
    embed: Callable[[Tensor, Tensor, bool], Tensor] = embed
    rms_norm: Callable[[Tensor, Tensor, float, Weight | None], Any] = rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, Weight | None], Any] = add_rms_norm
    linear: Linear = linear
    row_parallel_linear: Linear = linear
    gated_linear: Callable[[Any, Weight, Tensor | None, Weight | None], Any] = gated_linear
    rope_store_kv: Callable[[Tensor, RopeStore, Tensor | None], Tensor] = rope_store_kv
    moe: Callable[[Tensor, Tensor, Tensor | Fp8Weight, Tensor | Fp8Weight, int, bool], Tensor] = moe
    gather_logits: Callable[[Tensor], Tensor] = lambda logits: logits
    sample: Sample = sample_slots
    sample_gathered: Sample = sample_slots


PLAIN = Operations()


def pack(weight: Weight, int8: bool = False) -> Weight:
    """A weight (out, in) for the CPU, FP8 or float32, as float32 or int8 in oneDNN's layout; any other as it is.

    A packed weight keeps its shape, is good for `linear` only, and may round sums differently. SmolLM2-135M's matrices
    on two cores of a Zen 4: 21 ms against 43 for one row, 21 against 52 for 8, 640 against 740 for 512.
    """
    if isinstance(weight, Fp8Weight):
        weight = weight.dequantize(torch.float32)
    if isinstance(weight, Int8Weight):
        return weight
    if int8:
        return quantize_int8(weight)
    if weight.dtype != torch.float32 or not torch._C._has_mkldnn:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    return packed
