"""The one decoder: every architecture is a `ModelSpec` that switches parts of it on."""

from __future__ import annotations

import torch
from torch import Tensor

from minisgl.models.forward import ForwardBatch, ForwardPass
from minisgl.models.rotary import rope_table
from minisgl.models.spec import ModelSpec
from minisgl.models.weights import Weights
from minisgl.ops.attention.base import Attention, PlannedAttention, ProjectingAttention
from minisgl.ops.kv import KVCache
from minisgl.ops.linear import linear, pack
from minisgl.ops.operations import PLAIN, Operations

PACKED = ("qkv", "o", "gate_up", "down")


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
        if projects := isinstance(attention, ProjectingAttention):
            attention.begin(self.spec.windows)
        way = ForwardPass(self, batch, kv, projects)
        x = way.enter()
        for index in range(self.spec.num_layers - 1):
            x = way.between(index, way.attend(attention, index, x))
        return way.leave(way.attend(attention, self.spec.num_layers - 1, x), batch.rows)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (n, V) of hidden states (n, D), in their dtype; on a GPU the product can be written to `out`.

        On one rank of several they are those of its own tokens (`Operations.whole_logits`).
        """
        if out is None:
            return linear(hidden, self.weights.head)
        return torch.mm(hidden, self.weights.head.t(), out=out)


def pack_weights(weights: Weights) -> None:
    """Replace the matrices by the layout that the device multiplies from fastest, one at a time to save memory."""
    for layer in weights.layers:
        for name in PACKED:
            if (weight := getattr(layer, name)) is not None:
                setattr(layer, name, pack(weight))
    weights.head = pack(weights.head)
