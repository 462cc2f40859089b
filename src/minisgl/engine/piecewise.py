"""Steps with prompts as CUDA graphs: one for everything between two attentions, for each of some numbers of tokens.

What prefill attention launches depends on lengths that the host knows, so it stays out of the graphs. All else depends
on the number of tokens alone, and launching it kernel by kernel takes the host longer than the device needs for it
while tokens are few. (vLLM and SGLang call such graphs piecewise.)
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisgl.models.decoder import Decoder
from minisgl.models.forward import ForwardBatch, ForwardPass
from minisgl.ops.attention.base import PlannedAttention
from minisgl.ops.kv import KVCache


def piece_sizes(largest: int) -> list[int]:
    """Numbers of tokens to capture: a step is padded by a third at most, from 16 tokens on. None for 0."""
    steps = (range(16, 64, 16), range(64, 128, 32), range(128, 512, 64), range(512, 1024, 128))
    sizes = {size for step in steps for size in step} | set(range(1024, largest + 1, 256)) | {largest}
    return sorted(size for size in sizes if 0 < size <= largest)


@dataclass(frozen=True)
class Pieces:
    """The graphs for T tokens, and the tensors by which they are fed and leave what they find."""

    batch: ForwardBatch
    way: ForwardPass
    queries: Tensor  # (T, H, hd) what a layer's attention starts from
    heads: Tensor  # (T, H * hd) what it found
    graphs: list[torch.cuda.CUDAGraph]  # graph i ends before the attention of layer i


class PiecewiseGraphs:
    """Graphs over one runner's cache, captured when this is made, largest first into one memory pool."""

    def __init__(self, decoder: Decoder, kv: KVCache, largest: int) -> None:
        self.decoder = decoder
        self.kv = kv
        self.scratch = kv.num_pages * kv.page_size
        pool = torch.cuda.graph_pool_handle()
        self.sizes = piece_sizes(largest)
        self.pieces = {size: self._capture(size, pool) for size in reversed(self.sizes)}

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether the step has tokens that nobody asks about, as steps with prompts have, and fits a size."""
        return batch.rows is not None and 0 < len(batch.ids) <= self.sizes[-1]

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, attention: PlannedAttention) -> Tensor:
        """`Decoder.forward` of such a step."""
        tokens = len(batch.ids)
        pieces = self.pieces[self.sizes[bisect.bisect_left(self.sizes, tokens)]]
        pieces.batch.ids[:tokens].copy_(batch.ids)
        pieces.batch.positions[:tokens].copy_(batch.positions)
        pieces.batch.locations[:tokens].copy_(batch.locations)
        pieces.batch.locations[tokens:].fill_(self.scratch)
        queries, heads = pieces.queries[:tokens], pieces.heads[:tokens]
        for index, graph in enumerate(pieces.graphs):
            graph.replay()
            heads.copy_(pieces.way.attend(attention, index, queries))
        return pieces.way.leave(heads, batch.rows)

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> Pieces:
        spec, device = self.decoder.spec, self.decoder.weights.embedding.device
        numbers = torch.zeros((2, size), dtype=torch.int32, device=device)
        locations = torch.full((size,), self.scratch, dtype=torch.int64, device=device)
        batch = ForwardBatch(ids=numbers[0], positions=numbers[1], locations=locations, rows=locations[:0])
        dtype = self.decoder.weights.embedding.dtype
        queries = torch.zeros((size, spec.num_heads, spec.head_dim), dtype=dtype, device=device)
        heads = torch.zeros((size, spec.num_heads * spec.head_dim), dtype=dtype, device=device)
        way = ForwardPass(self.decoder, batch, self.kv, queries=queries)
        for index in range(min(2, spec.num_layers)):  # compiles what is not yet compiled
            _piece(way, index, heads)
        torch.cuda.synchronize(device)
        graphs = []
        for index in range(spec.num_layers):
            graph = torch.cuda.CUDAGraph()
            # Other threads may ask about events meanwhile: those that watch over collectives, or collect.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                _piece(way, index, heads)
            graphs.append(graph)
        return Pieces(batch, way, queries, heads, graphs)


def _piece(way: ForwardPass, index: int, heads: Tensor) -> None:
    if index == 0:
        way.enter()
    else:
        way.between(index - 1, heads)
