"""The one decoder: every architecture is a `ModelSpec` that switches parts of it on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.core.attention import Attention, PlannedAttention
from minisgl.core.kv_cache import KVCache
from minisgl.core.model_config import ModelSpec, Rope
from minisgl.core.ops import PLAIN, Operations, RopeStore, linear, pack
from minisgl.core.quantization import Activations
from minisgl.core.weights import LayerWeights, Weights


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """The T tokens of a step, as tensors on the device."""

    ids: Tensor  # int32 (T,)
    positions: Tensor  # int32 (T,)
    slot_mapping: Tensor  # int64 (T,) places in the cache, page * page_size + offset
    logits_indices: Tensor | None  # int64 (n,) the tokens whose hidden states are wanted; None: all


class Decoder:
    """A decoder-only transformer: D hidden size, H heads, K KV heads, hd head size, V vocabulary.

    With tensor parallelism `spec` and `weights` are a rank's share, and `ops` does the all-reduces.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, attention: Attention, max_seq_len: int, ops: Operations = PLAIN
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = attention
        self.ops = ops
        self.rope = rope_table(spec.rope, spec.head_dim, max_seq_len, weights.embedding.device)

    def forward(self, batch: ForwardBatch, attention: PlannedAttention, kv: KVCache) -> Tensor:
        """Run the layers, writing each token's keys and values, and return the last norm of the wanted rows (n, D).

        In each layer all tokens are written before any is read: a row may share pages that another row of the same
        step fills.
        """
        attention.begin(self.spec.windows)
        x, residual = self.embed(batch)
        for index, window in enumerate(self.spec.windows):
            qkv, rope = self.before_attention(index, x, batch, kv)
            heads = attention.run_qkv(qkv, rope, index, window)
            x, residual = self.after_attention(index, heads, residual, batch.logits_indices)
        assert isinstance(x, Tensor)
        return x

    def embed(self, batch: ForwardBatch) -> tuple[Activations, Tensor]:
        """The first layer's normed input and the residual stream, both (T, D)."""
        residual = self.ops.embed(batch.ids, self.weights.embedding, batch.logits_indices is None)
        layer = self.weights.layers[0]
        return self.ops.rms_norm(residual, layer.input_norm, self.spec.rms_eps, layer.qkv), residual

    def before_attention(
        self, index: int, x: Activations, batch: ForwardBatch, kv: KVCache
    ) -> tuple[Tensor, RopeStore]:
        """QKV (T, (H + 2K) * hd) of x (T, D), and the `RopeStore` to apply to it."""
        layer = self.weights.layers[index]
        qkv = self.ops.linear(x, layer.qkv, layer.qkv_bias)
        rope = RopeStore(
            self.ops.rope_store_kv, layer.q_norm, layer.k_norm, self.spec.rms_eps, self.rope,
            batch.positions, batch.slot_mapping, kv.k[index], kv.v[index],
        )  # fmt: skip
        return qkv, rope

    def after_attention(
        self, index: int, heads: Tensor, residual: Tensor, logits_indices: Tensor | None
    ) -> tuple[Activations, Tensor]:
        """Output projection and MLP: heads (T, H, hd) -> the next layer's normed input and the residual stream.

        The last layer keeps only the rows of `logits_indices`, and ends with the last norm.
        """
        ops, eps, layers = self.ops, self.spec.rms_eps, self.weights.layers
        layer, is_last = layers[index], index == len(layers) - 1
        if is_last and logits_indices is not None:
            heads, residual = heads.index_select(0, logits_indices), residual.index_select(0, logits_indices)
            if not len(logits_indices):
                return residual, residual
        x = ops.row_parallel_linear(heads.flatten(1), layer.o, layer.o_bias)
        x = self.mlp(layer, ops.add_rms_norm(x, residual, layer.post_norm, eps, layer.gate_up))
        if is_last:
            return ops.add_rms_norm(x, residual, self.weights.norm, eps, None), residual
        return ops.add_rms_norm(x, residual, layers[index + 1].input_norm, eps, layers[index + 1].qkv), residual

    def mlp(self, layer: LayerWeights, x: Activations) -> Tensor:
        if layer.router is None:
            assert layer.gate_up is not None
            assert layer.down is not None
            hidden = self.ops.gated_linear(x, layer.gate_up, layer.gate_up_bias, layer.down)
            return self.ops.row_parallel_linear(hidden, layer.down, layer.down_bias)
        moe, gate_up, down = self.spec.moe, layer.expert_gate_up, layer.expert_down
        assert moe is not None
        assert gate_up is not None
        assert down is not None
        assert isinstance(x, Tensor)  # a router is never quantised
        return self.ops.moe(x, layer.router, gate_up, down, moe.top_k, moe.norm_topk_prob)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (n, V), a rank's own (n, V / ranks), of hidden states (n, D); on a GPU written to `out` if given."""
        if out is None:
            return linear(hidden, self.weights.head)
        assert isinstance(self.weights.head, Tensor)
        return torch.mm(hidden, self.weights.head.t(), out=out)


def pack_weights(weights: Weights, int8: bool = False) -> None:
    """`pack` the matrices and the head for the CPU, one at a time to save memory."""
    for layer in weights.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            if (weight := getattr(layer, name)) is not None:
                setattr(layer, name, pack(weight, int8))
    weights.head = pack(weights.head, int8)


def rope_table(rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """Scaled cosines, then sines, of every position's angles: float32 (max_positions, head_dim)."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.divisors:
        frequencies /= torch.tensor(rope.divisors, dtype=torch.float32)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * rope.scale).to(device)
