"""The rotary embedding's angles as a table, for each kind of `Rope`.

A step's way through the decoder, cut at attention, which needs all its tokens; the rest goes row by row.

The one decoder: every architecture is a `ModelSpec` that switches parts of it on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minisgl.core.attention import Attention, PlannedAttention, ProjectingAttention, Projection
from minisgl.core.kv_cache import KVCache
from minisgl.core.model_config import ModelSpec, Rope
from minisgl.core.ops import PLAIN, Norm, Operations, linear, pack
from minisgl.core.weights import LayerWeights, Weights


def rope_table(rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position's angles, scaled as yarn asks: float32 (max_positions, head_dim)."""
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(rope, head_dim))
    scale = yarn_attention_factor(rope) if rope.kind == "yarn" else 1.0
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * scale).to(device)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per token of each pair of dimensions: float32 (head_dim / 2,)."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, frequencies)
    return frequencies


def _llama3(rope: Rope, frequencies: Tensor) -> Tensor:
    """Meta's rule: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    rotations = rope.original_max_position * frequencies / (2 * math.pi)  # over the original context
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return torch.lerp(frequencies / rope.factor, frequencies, kept.clamp(0.0, 1.0))


def _yarn(rope: Rope, head_dim: int, frequencies: Tensor) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.2): a linear ramp over dimensions instead of wavelengths."""

    def dimension(rotations: float) -> float:
        """The pair, as a real number, that turns this often over the original context."""
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched = ((pairs - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return torch.lerp(frequencies, frequencies / rope.factor, stretched)


def yarn_attention_factor(rope: Rope) -> float:
    """What yarn scales cos and sin by, the square root of its attention temperature's inverse."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """The T tokens of a step, as tensors on the device."""

    ids: Tensor  # int32 (T,)
    positions: Tensor  # int32 (T,)
    locations: Tensor  # int64 (T,) places in the cache, page * page_size + offset
    rows: Tensor | None  # int64 (n,) the tokens whose hidden states are wanted; None: all


class ForwardPass:
    """`enter`, then for each layer `attend`, with `between` after all but the last, which `leave` follows.

    What goes into `attend` are rotated queries (T, H, hd), whose keys and values have been written, or, where attention
    does that itself (`projects`), a layer's QKV product (T, (H + 2K) * hd). What comes out is (T, H * hd).
    """

    residual: Tensor  # (T, D) the residual stream

    def __init__(
        self,
        decoder: Decoder,
        batch: ForwardBatch,
        kv: KVCache,
        projects: bool = False,
        queries: Tensor | None = None,
    ) -> None:
        """`queries` (T, H, hd): where each layer's are written, if they do not need memory of their own."""
        self.decoder = decoder
        self.layers = decoder.weights.layers
        self.ops, self.eps = decoder.ops, decoder.spec.rms_eps
        self.batch = batch
        self.kv = kv
        self.projects = projects
        self.queries = queries

    def enter(self) -> Tensor:
        """Look the tokens up, up to the first layer's attention."""
        self.residual = self.ops.embed(self.batch.ids, self.decoder.weights.embedding, self.batch.rows is None)
        self.turns = self.ops.turns(self.residual)
        return self._queries(0, [self.ops.rms_norm] * len(self.turns.rows))

    def attend(self, attention: PlannedAttention, index: int, x: Tensor) -> Tensor:
        """Attention of layer `index`."""
        spec, layer, window = self.decoder.spec, self.layers[index], self.decoder.spec.windows[index]
        if self.projects:
            projection = Projection(q_norm=layer.q_norm, k_norm=layer.k_norm, eps=self.eps, cos_sin=self.decoder.rope)
            heads = cast(ProjectingAttention, attention).project(x, projection, index, window)
        else:
            heads = attention.run(x, index, window)
        return heads.reshape(len(x), spec.num_heads * spec.head_dim)

    def between(self, index: int, heads: Tensor) -> Tensor:
        """From layer `index`'s attention to that of the next."""
        layer = self.layers[index]
        # Each part's norm is called once, when the part has its turn. `_outputs` and `_mlps` are generators: what they
        # yield for a part begins to be added before they compute the next.
        norms = [self.turns.add(x) for x in self._outputs(layer, heads)]
        norms = [self.turns.add(x) for x in self._mlps(layer, norms)]
        return self._queries(index + 1, norms)

    def leave(self, heads: Tensor, rows: Tensor | None) -> Tensor:
        """From the last layer's attention to the last norm, for the wanted rows alone: int64 (n,) -> (n, D)."""
        ops, layer, residual = self.ops, self.layers[-1], self.residual
        if rows is not None:
            heads, residual = heads.index_select(0, rows), residual.index_select(0, rows)
        if not len(heads):
            return residual
        x = ops.project(heads, layer.o, layer.o_bias)
        x = self._mlp(layer, ops.add_rms_norm(x, residual, layer.post_norm, self.eps))
        return ops.add_rms_norm(x, residual, self.decoder.weights.norm, self.eps)

    def _queries(self, index: int, norms: list[Norm]) -> Tensor:
        batch, layer = self.batch, self.layers[index]
        qkv = self._qkv(layer, norms)
        if self.projects:
            return qkv
        return self.ops.rope_store_kv(
            qkv, layer.q_norm, layer.k_norm, self.eps, self.decoder.rope, batch.positions, batch.locations,
            self.kv.k[index], self.kv.v[index], self.queries,
        )  # fmt: skip

    def _qkv(self, layer: LayerWeights, norms: list[Norm]) -> Tensor:
        ops, residual = self.ops, self.residual
        if len(norms) == 1:
            return ops.linear(norms.pop()(residual, layer.input_norm, self.eps), layer.qkv, layer.qkv_bias)
        qkv = residual.new_empty((len(residual), layer.qkv.shape[0]))
        for stream, out in zip(self.turns.split(residual), self.turns.split(qkv), strict=True):
            ops.linear_into(norms.pop(0)(stream, layer.input_norm, self.eps), layer.qkv, layer.qkv_bias, out)
        return qkv

    def _outputs(self, layer: LayerWeights, heads: Tensor) -> Iterator[Tensor]:
        for part in self.turns.split(heads):
            yield self.ops.project(part, layer.o, layer.o_bias)

    def _mlps(self, layer: LayerWeights, norms: list[Norm]) -> Iterator[Tensor]:
        for stream in self.turns.split(self.residual):
            yield self._mlp(layer, norms.pop(0)(stream, layer.post_norm, self.eps))

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        if layer.router is None:
            assert layer.gate_up is not None
            assert layer.down is not None
            hidden = self.ops.gated(x, layer.gate_up, layer.gate_up_bias)
            return self.ops.project(hidden, layer.down, layer.down_bias)
        moe = self.decoder.spec.moe
        assert moe is not None
        assert layer.expert_gate_up is not None
        assert layer.expert_down is not None
        return self.ops.moe(x, layer.router, layer.expert_gate_up, layer.expert_down, moe.top_k, moe.norm_topk_prob)


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
