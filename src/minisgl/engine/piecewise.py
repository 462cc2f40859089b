"""Steps with prompts as CUDA graphs: one for everything between two attentions, for each of some numbers of tokens.

What prefill attention launches depends on lengths that the host knows, so it stays out of the graphs. All else depends
on the number of tokens alone, and launching it kernel by kernel takes the host longer than the device needs for it
while tokens are few. (vLLM and SGLang call such graphs piecewise.)
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.engine.capture import capturing
from minisgl.models.decoder import Decoder
from minisgl.models.forward import ForwardBatch, ForwardPass
from minisgl.ops.attention.base import PlannedAttention
from minisgl.ops.kv import KVCache

Work = Callable[[], object]
Capture = Callable[[Work], Work]
"""Something that does the same whenever it is called -> what does it again."""


def piece_sizes(largest: int) -> list[int]:
    """Numbers of tokens to capture: a step is padded by half of its own or by 15 at most. None for 0."""
    steps = (range(16, 64, 16), range(64, 128, 32), range(128, 512, 64), range(512, 1024, 128))
    sizes = {size for step in steps for size in step} | set(range(1024, largest + 1, 256)) | {largest}
    return sorted(size for size in sizes if 0 < size <= largest)


def largest_piece(config: Config) -> int:
    """The most tokens that `config` asks for, and a step with prompts can have; 0: no graphs."""
    if not config.piecewise_cuda_graph_max_tokens:
        return 0
    assert config.max_prefill_length is not None
    assert config.max_running_requests is not None
    return min(config.piecewise_cuda_graph_max_tokens, config.max_prefill_length + config.max_running_requests)


class CudaCapture:
    """Makes CUDA graphs in one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """The graph's replay."""
        with capturing(self.pool) as graph:
            work()
        return graph.replay


class Pieces(NamedTuple):
    """The graphs for a number of tokens."""

    way: ForwardPass
    replays: list[Work]  # number i ends before the attention of layer i


class PiecewiseGraphs:
    """Graphs over one runner's cache, captured when this is made, largest first.

    All sizes T share the tensors by which they are fed and leave what they find, and look at them up to T: `numbers`
    int32 (2, largest), ids and positions; `locations` int64 (largest,); `queries` (largest, H, hd), what a layer's
    attention starts from, and `heads` (largest, H * hd), what it finds. `make_capture` is what makes graphs; a test
    without a card does everything anew instead.
    """

    def __init__(
        self, decoder: Decoder, kv: KVCache, largest: int, make_capture: Callable[[], Capture] = CudaCapture
    ) -> None:
        spec, table = decoder.spec, decoder.weights.embedding
        self.decoder = decoder
        self.kv = kv
        self.scratch = kv.num_pages * kv.page_size
        self.numbers = torch.zeros((2, largest), dtype=torch.int32, device=table.device)
        self.locations = torch.full((largest,), self.scratch, dtype=torch.int64, device=table.device)
        self.queries = torch.zeros((largest, spec.num_heads, spec.head_dim), dtype=table.dtype, device=table.device)
        self.heads = torch.zeros_like(self.queries).flatten(1)
        self.sizes = piece_sizes(largest)
        capture = make_capture()
        self.pieces = {size: self._capture(size, capture) for size in reversed(self.sizes)}

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether the batch is a step with prompts, which wants some of its tokens alone, and fits a size."""
        return batch.rows is not None and 0 < len(batch.ids) <= self.sizes[-1]

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, attention: PlannedAttention) -> Tensor:
        """`Decoder.forward` of such a step."""
        tokens = len(batch.ids)
        size = self.sizes[bisect.bisect_left(self.sizes, tokens)]
        way, replays = self.pieces[size]
        self.numbers[0, :tokens].copy_(batch.ids)
        self.numbers[1, :tokens].copy_(batch.positions)
        self.locations[:tokens].copy_(batch.locations)
        self.locations[tokens:size].fill_(self.scratch)
        queries, heads = self.queries[:tokens], self.heads[:tokens]
        for index, replay in enumerate(replays):
            replay()
            heads.copy_(way.attend(attention, index, queries))
        return way.leave(heads, batch.rows)

    @torch.inference_mode()
    def _capture(self, size: int, capture: Capture) -> Pieces:
        (ids, positions), locations = self.numbers[:, :size], self.locations[:size]
        batch = ForwardBatch(ids=ids, positions=positions, locations=locations, rows=locations[:0])
        heads = self.heads[:size]
        way = ForwardPass(self.decoder, batch, self.kv, queries=self.queries[:size])
        work: list[Work] = [way.enter]
        work += [partial(way.between, index, heads) for index in range(len(way.layers) - 1)]
        for piece in work[:2]:  # compiles what is not yet compiled
            piece()
        return Pieces(way, [capture(piece) for piece in work])
