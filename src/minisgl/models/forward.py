"""A step's way through the decoder, cut at attention, which needs all its tokens; the rest goes row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor

from minisgl.models.weights import LayerWeights
from minisgl.ops.attention.base import PlannedAttention, ProjectingAttention, Projection
from minisgl.ops.kv import KVCache
from minisgl.ops.turns import Norm

if TYPE_CHECKING:
    from minisgl.models.decoder import Decoder


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
