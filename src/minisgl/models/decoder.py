"""The one decoder: every architecture is a `ModelSpec` that switches parts of it on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minisgl.models.rotary import rope_table
from minisgl.models.spec import ModelSpec
from minisgl.models.weights import LayerWeights, Weights
from minisgl.ops.attention.base import Attention, Geometry, PlannedAttention
from minisgl.ops.kv import KVCache
from minisgl.ops.linear import linear, pack
from minisgl.ops.reference import add_rms_norm, apply_rope, moe, rms_norm, silu_mul, store_kv

PACKED = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """The T tokens of a step, as tensors on the device, and the shape of its attention."""

    ids: Tensor  # int32 (T,)
    positions: Tensor  # int32 (T,)
    locations: Tensor  # int64 (T,) places in the cache, page * page_size + offset
    geometry: Geometry
    rows: Tensor | None  # int64 (n,) the tokens whose hidden states are wanted; None: all


class Decoder:
    """A decoder-only transformer: D hidden size, H heads, K KV heads, hd head size, V vocabulary."""

    def __init__(self, spec: ModelSpec, weights: Weights, attention: Attention, max_seq_len: int) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.rope = rope_table(spec.rope, spec.head_dim, max_seq_len, weights.embedding.device)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Run the layers, writing each token's keys and values, and return the last norm of the wanted rows (n, D).

        In each layer all tokens are written before any is read: a row may share pages that another row of the same
        step fills.
        """
        attention = self.attention.plan(batch.geometry, kv)
        cos_sin = self.rope.index_select(0, batch.positions)  # (T, hd)
        residual = self.weights.embedding.index_select(0, batch.ids)
        x: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            eps = self.spec.rms_eps
            if x is None:
                x = rms_norm(residual, layer.input_norm, eps)
            else:
                x = add_rms_norm(x, residual, layer.input_norm, eps)
            x = self._attend(index, layer, x, cos_sin, batch.locations, attention, kv)
            x = add_rms_norm(x, residual, layer.post_norm, eps)
            x = self._mlp(layer, x)
        assert x is not None
        if batch.rows is not None:
            x, residual = x.index_select(0, batch.rows), residual.index_select(0, batch.rows)
        return add_rms_norm(x, residual, self.weights.norm, self.spec.rms_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of hidden states (n, D), in their dtype."""
        return linear(hidden, self.weights.head)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        cos_sin: Tensor,
        locations: Tensor,
        attention: PlannedAttention,
        kv: KVCache,
    ) -> Tensor:
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = linear(x, layer.qkv, layer.qkv_bias).view(len(x), heads + 2 * kv_heads, spec.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = apply_rope(rms_norm(q, layer.q_norm, spec.rms_eps), cos_sin)
            k = apply_rope(rms_norm(k, layer.k_norm, spec.rms_eps), cos_sin)
        else:
            q, k = apply_rope(qkv[:, : heads + kv_heads], cos_sin).tensor_split([heads], dim=1)
        store_kv(k, v, kv.k[index], kv.v[index], locations)
        out = attention.run(q, index, spec.windows[index])
        return linear(out.reshape(len(x), heads * spec.head_dim), layer.o, layer.o_bias)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        if layer.router is None:
            assert layer.gate_up is not None
            assert layer.down is not None
            return linear(silu_mul(linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
        assert self.spec.moe is not None
        assert layer.expert_gate_up is not None
        assert layer.expert_down is not None
        top_k, norm = self.spec.moe.top_k, self.spec.moe.norm_topk_prob
        return moe(x, layer.router, layer.expert_gate_up, layer.expert_down, top_k, norm)


def pack_weights(weights: Weights) -> None:
    """Replace the matrices by the layout that the device multiplies from fastest, one at a time to save memory."""
    for layer in weights.layers:
        for name in PACKED:
            if (weight := getattr(layer, name)) is not None:
                setattr(layer, name, pack(weight))
    weights.head = pack(weights.head)
