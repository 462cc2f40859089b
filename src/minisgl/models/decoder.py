"""The one decoder: every architecture is a `ModelSpec` that switches parts of it on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.models.rotary import rope_table
from minisgl.models.spec import ModelSpec
from minisgl.models.weights import LayerWeights, Weights
from minisgl.ops.attention.base import Attention, PlannedAttention, ProjectingAttention, Projection
from minisgl.ops.kv import KVCache
from minisgl.ops.linear import linear, pack
from minisgl.ops.operations import PLAIN, Operations
from minisgl.ops.turns import Norm, Turns

PACKED = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """The T tokens of a step, as tensors on the device."""

    ids: Tensor  # int32 (T,)
    positions: Tensor  # int32 (T,)
    locations: Tensor  # int64 (T,) places in the cache, page * page_size + offset
    rows: Tensor | None  # int64 (n,) the tokens whose hidden states are wanted; None: all


class Decoder:
    """A decoder-only transformer: D hidden size, H heads, K KV heads, hd head size, V vocabulary.

    On one rank of several `spec` and `weights` are that rank's share, and `ops` adds up what the ranks computed.
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
        ops, layers = self.ops, self.weights.layers
        if isinstance(attention, ProjectingAttention):
            attention.begin(self.spec.windows)
        residual = ops.embed(batch.ids, self.weights.embedding, batch.rows is None)
        turns = ops.turns(residual)
        streams = turns.split(residual)
        # Each part's norm is called once, when the part has its turn. `_attend` and `_mlps` are generators: what they
        # yield for a part begins to be added before they compute the next.
        norms: list[Norm] = [ops.rms_norm] * len(streams)
        for index, layer in enumerate(layers):
            norms = [turns.add(x) for x in self._attend(index, layer, norms, residual, turns, batch, attention, kv)]
            if index + 1 < len(layers):
                norms = [turns.add(x) for x in self._mlps(layer, norms, streams)]
        x = turns.join(list(self._mlps(layers[-1], norms, streams)))
        if batch.rows is not None:  # before the last addition, which on several ranks is a sum
            x, residual = x.index_select(-2, batch.rows), residual.index_select(0, batch.rows)
        return ops.add_rms_norm(x, residual, self.weights.norm, self.spec.rms_eps)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (n, V) of hidden states (n, D), in their dtype; on a GPU the product can be written to `out`.

        On one rank of several they are those of its own tokens (`Operations.whole_logits`).
        """
        if out is None:
            return linear(hidden, self.weights.head)
        return torch.mm(hidden, self.weights.head.t(), out=out)

    def _attend(
        self,
        index: int,
        layer: LayerWeights,
        norms: list[Norm],
        residual: Tensor,
        turns: Turns,
        batch: ForwardBatch,
        attention: PlannedAttention,
        kv: KVCache,
    ) -> Iterator[Tensor]:
        """Attention of all rows, and then the output product of each part."""
        spec = self.spec
        qkv = self._qkv(layer, norms, residual, turns)
        if isinstance(attention, ProjectingAttention):
            projection = Projection(q_norm=layer.q_norm, k_norm=layer.k_norm, eps=spec.rms_eps, cos_sin=self.rope)
            out = attention.project(qkv, projection, index, spec.windows[index])
        else:
            q = self.ops.rope_store_kv(
                qkv,
                layer.q_norm,
                layer.k_norm,
                spec.rms_eps,
                self.rope,
                batch.positions,
                batch.locations,
                kv.k[index],
                kv.v[index],
            )
            out = attention.run(q, index, spec.windows[index])
        for heads in turns.split(out.reshape(len(qkv), spec.num_heads * spec.head_dim)):
            yield self.ops.project(heads, layer.o, layer.o_bias)

    def _qkv(self, layer: LayerWeights, norms: list[Norm], residual: Tensor, turns: Turns) -> Tensor:
        ops, eps = self.ops, self.spec.rms_eps
        if len(norms) == 1:
            return ops.linear(norms.pop()(residual, layer.input_norm, eps), layer.qkv, layer.qkv_bias)
        qkv = residual.new_empty((len(residual), layer.qkv.shape[0]))
        for stream, out in zip(turns.split(residual), turns.split(qkv), strict=True):
            ops.linear_into(norms.pop(0)(stream, layer.input_norm, eps), layer.qkv, layer.qkv_bias, out)
        return qkv

    def _mlps(self, layer: LayerWeights, norms: list[Norm], streams: Sequence[Tensor]) -> Iterator[Tensor]:
        for stream in streams:
            yield self._mlp(layer, norms.pop(0)(stream, layer.post_norm, self.spec.rms_eps))

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        if layer.router is None:
            assert layer.gate_up is not None
            assert layer.down is not None
            hidden = self.ops.gated(x, layer.gate_up, layer.gate_up_bias)
            return self.ops.project(hidden, layer.down, layer.down_bias)
        assert self.spec.moe is not None
        assert layer.expert_gate_up is not None
        assert layer.expert_down is not None
        top_k, norm = self.spec.moe.top_k, self.spec.moe.norm_topk_prob
        return self.ops.moe(x, layer.router, layer.expert_gate_up, layer.expert_down, top_k, norm)


def pack_weights(weights: Weights) -> None:
    """Replace the matrices by the layout that the device multiplies from fastest, one at a time to save memory."""
    for layer in weights.layers:
        for name in PACKED:
            if (weight := getattr(layer, name)) is not None:
                setattr(layer, name, pack(weight))
    weights.head = pack(weights.head)
