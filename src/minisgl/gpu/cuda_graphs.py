"""The capture of a CUDA graph, as all of the engine's graphs are captured.

A decode step as one CUDA graph: gather rows, decoder, sampling, write back. The host sends `changes` and replays.

A graph is captured for each of some batch sizes; a step takes the smallest that holds it and pads with the tables'
last row, which lives on the scratch page.

Steps with prompts as CUDA graphs: one for everything between two attentions, for each of some numbers of tokens.

What prefill attention launches depends on lengths that the host knows, so it stays out of the graphs. All else depends
on the number of tokens alone, and launching it kernel by kernel takes the host longer than the device needs for it
while tokens are few. (vLLM and SGLang call such graphs piecewise.)
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.attention import GraphBackend, GraphDecode, PlannedAttention
from minisgl.core.decoder import Decoder, ForwardBatch, ForwardPass
from minisgl.core.kv_cache import DeviceTables, KVCache, StepInputs
from minisgl.core.logits import StepOutput
from minisgl.core.plan import Int32, StepPlan
from minisgl.gpu.kernels.step import commit_rows, gather_rows


@contextmanager
def capturing(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph, in the memory pool that this is the handle of, of what is launched until the end.

    It must have been launched once before, which compiles what it needs. Other threads may ask about events meanwhile:
    those that watch over collectives, or collect.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield graph


IN_FLIGHT = 4
"""Copies of `changes` on the host; more than steps can be launched and not collected."""


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then every eighth, and `largest` itself; never more than it."""
    sizes = {1, 2, 4, *range(8, largest + 1, 8), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass(frozen=True)
class CapturedStep:
    """A graph for B rows, and the tensors it reads and leaves: it knows their addresses only, so they live as long."""

    graph: torch.cuda.CUDAGraph
    changes: Tensor  # int32 (3, B), on the device
    inputs: StepInputs
    tokens: Tensor  # int32 (B,)
    attention: GraphDecode


class DecodeGraphs:
    """Graphs over one runner's tables and cache, captured when this is made, largest first into one memory pool.

    All sizes write their logits to one buffer outside the pool, where a tail finds them: the product lands there
    directly, and the pool need not hold it.
    """

    def __init__(
        self, decoder: Decoder, kv: KVCache, tables: DeviceTables, sizes: Iterable[int], max_seq_len: int
    ) -> None:
        backend = decoder.attention.decode
        assert isinstance(backend, GraphBackend)
        self.decoder = decoder
        self.kv = kv
        self.tables = tables
        self.backend = backend
        self.max_seq_len = max_seq_len
        self.padding = len(tables.length) - 1
        self.steps: dict[int, CapturedStep] = {}
        pool = torch.cuda.graph_pool_handle()
        sizes = sorted(sizes, reverse=True)
        head = decoder.weights.head
        self.logits = torch.empty((sizes[0], len(head)), dtype=head.dtype, device=head.device)
        for size in sizes:
            self.steps[size] = self._capture(size, pool)
        self.sizes = sorted(self.steps)
        hosts = (torch.zeros((3, self.sizes[-1]), dtype=torch.int32).pin_memory() for _ in range(IN_FLIGHT))
        self._hosts = itertools.cycle([host.numpy() for host in hosts])

    def takes(self, plan: StepPlan) -> bool:
        """Whether the plan is a decode step that fits a graph."""
        rows = len(plan.decode_slots)
        return plan.init is None and len(plan.prefill_slots) == 0 and 0 < rows <= self.sizes[-1]

    def run(self, plan: StepPlan) -> StepOutput:
        """Replay the plan's step; what it leaves is good until the next step."""
        rows = len(plan.decode_slots)
        size = self.sizes[int(np.searchsorted(self.sizes, rows))]
        step = self.steps[size]
        step.changes.copy_(self._write_changes(plan, rows, size), non_blocking=True)
        lens = np.ones(size, np.int32)
        lens[:rows] = plan.decode_lens + 1
        step.attention.prepare(lens)
        step.graph.replay()
        return StepOutput(step.tokens[:rows], self.logits[:rows])

    def _write_changes(self, plan: StepPlan, rows: int, size: int) -> Tensor:
        host = next(self._hosts).reshape(-1)[: 3 * size].reshape(3, size)
        host[0, :rows] = plan.decode_slots
        host[0, rows:] = self.padding
        host[1] = -1
        if len(plan.page_slots):
            row_of = self._rows_of(plan.decode_slots)[plan.page_slots]
            host[1, row_of] = plan.page_indices
            host[2, row_of] = plan.page_ids
        return torch.from_numpy(host)

    def _rows_of(self, slots: Int32) -> Int32:
        rows = np.empty(self.padding, np.int32)
        rows[slots] = np.arange(len(slots), dtype=np.int32)
        return rows

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> CapturedStep:
        device = self.tables.length.device
        inputs = StepInputs.allocate(size, self.tables.page_table.shape[1], self.kv.num_pages, device)
        changes = torch.full((3, size), -1, dtype=torch.int32, device=device)
        changes[0] = self.padding
        attention = self.backend.graph_decode(inputs.page_table, inputs.kv_lens, self.kv, self.max_seq_len)
        attention.prepare(np.ones(size, np.int32))
        self._step(changes, inputs, attention)  # compiles what is not yet compiled
        torch.cuda.synchronize(device)
        with capturing(pool) as graph:
            tokens = self._step(changes, inputs, attention)
        return CapturedStep(graph, changes, inputs, tokens, attention)

    def _step(self, changes: Tensor, inputs: StepInputs, attention: GraphDecode) -> Tensor:
        gather_rows(changes, self.tables, inputs, self.kv.page_size)
        batch = ForwardBatch(ids=inputs.ids, positions=inputs.positions, locations=inputs.locations, rows=None)
        hidden = self.decoder.forward(batch, attention.attention, self.kv)
        logits = self.decoder.logits(hidden, self.logits[: len(hidden)])
        tokens = self.decoder.ops.sample(logits, self.tables.sampling, changes[0], inputs.kv_lens, False, True, True)
        commit_rows(changes, tokens, self.tables, inputs)
        return tokens


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
