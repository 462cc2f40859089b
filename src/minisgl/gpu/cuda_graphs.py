"""CUDA graphs: steps as one graph each or, with some backends, as a graph for each part between two attentions."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.attention import AttentionMetadata, PlannedAttention
from minisgl.core.decoder import Decoder, ForwardBatch
from minisgl.core.kv_cache import DeviceTables, KVCache, StepInputs
from minisgl.core.logits import StepOutput
from minisgl.core.plan import StepPlan
from minisgl.core.quantization import Activations
from minisgl.gpu.attention.interface import GraphBackend, GraphDecode, StaticRows

CAPTURE_MODE = "thread_local"  # other threads may query events meanwhile: they watch collectives, or collect results
MAX_CHUNKS = 64  # of prompts in a step that is one graph
IN_FLIGHT = 4  # copies of `changes` on the host: more than there are steps launched and not collected


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then every eighth, and `largest` itself; never more than it."""
    sizes = {1, 2, 4, *range(8, largest + 1, 8), largest}
    return sorted(size for size in sizes if size <= largest)


@dataclass(frozen=True)
class CapturedStep:
    """A graph for B rows, and the tensors whose addresses it knows, kept alive."""

    graph: torch.cuda.CUDAGraph
    changes: Tensor  # int32 (3, B), on the device: slots, and the index and id of a new page or -1
    inputs: StepInputs
    tokens: Tensor  # int32 (B,)
    attention: GraphDecode


class DecodeGraphs:
    """Graphs from gathered rows to sampled tokens, over one runner's tables and cache, for each of some batch sizes.

    They are captured when this is made, largest first into one memory pool. The host sends `changes` and replays the
    smallest graph that holds a step, padded with the tables' last row, whose page is scratch. All sizes write their
    logits to one buffer outside the pool, where logits processors find them.
    """

    def __init__(self, decoder: Decoder, kv: KVCache, tables: DeviceTables, sizes: list[int], max_seq_len: int) -> None:
        assert isinstance(decoder.attention.decode, GraphBackend)
        self.decoder, self.kv, self.tables = decoder, kv, tables
        self.backend, self.max_seq_len = decoder.attention.decode, max_seq_len
        self.padding = len(tables.length) - 1
        self.sizes = sorted(sizes)
        head = decoder.weights.head
        assert isinstance(head, torch.Tensor)
        self.logits = torch.empty((self.sizes[-1], len(head)), dtype=head.dtype, device=head.device)
        pool = torch.cuda.graph_pool_handle()
        self.steps = {size: self._capture(size, pool) for size in reversed(self.sizes)}
        hosts = [torch.zeros((3, self.sizes[-1]), dtype=torch.int32).pin_memory().numpy() for _ in range(IN_FLIGHT)]
        self._hosts = itertools.cycle(hosts)

    def takes(self, plan: StepPlan) -> bool:
        """Whether the plan is a decode step that fits a graph."""
        rows = len(plan.decode_slots)
        return plan.init is None and len(plan.prefill_slots) == 0 and 0 < rows <= self.sizes[-1]

    def run(self, plan: StepPlan) -> StepOutput:
        """Replay the plan's step; the output is valid until the next step."""
        rows = len(plan.decode_slots)
        size = self.sizes[bisect.bisect_left(self.sizes, rows)]
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
            row_of_slot = np.empty(self.padding, np.int32)
            row_of_slot[plan.decode_slots] = np.arange(rows, dtype=np.int32)
            row = row_of_slot[plan.page_slots]
            host[1, row] = plan.page_indices
            host[2, row] = plan.page_ids
        return torch.from_numpy(host)

    @torch.inference_mode()
    def _capture(self, size: int, pool: Any) -> CapturedStep:
        table, device = self.tables.page_table, self.tables.page_table.device
        inputs = StepInputs.allocate(size, table.shape[1], self.kv.num_pages, device)
        changes = torch.full((3, size), -1, dtype=torch.int32, device=device)
        changes[0] = self.padding
        attention = self.backend.graph_decode(inputs.page_table, inputs.kv_lens, self.kv, self.max_seq_len)
        attention.prepare(np.ones(size, np.int32))
        self._step(changes, inputs, attention)  # compiles what is not yet compiled
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=CAPTURE_MODE):
            tokens = self._step(changes, inputs, attention)
        return CapturedStep(graph, changes, inputs, tokens, attention)

    def _step(self, changes: Tensor, inputs: StepInputs, attention: GraphDecode) -> Tensor:
        from minisgl.gpu.kernels.decode import commit_rows, gather_rows  # a machine without a GPU may lack triton

        gather_rows(changes, self.tables, inputs, self.kv.page_size)
        ids, positions, slot_mapping = inputs.ids, inputs.positions, inputs.slot_mapping
        batch = ForwardBatch(ids=ids, positions=positions, slot_mapping=slot_mapping, logits_indices=None)
        hidden = self.decoder.forward(batch, attention.attention, self.kv)
        logits = self.decoder.logits(hidden, self.logits[: len(hidden)])
        tokens = self.decoder.ops.sample(logits, self.tables.sampling, changes[0], inputs.kv_lens, False, True, True)
        commit_rows(changes, tokens, self.tables, inputs)
        return tokens


def piecewise_sizes(largest: int) -> list[int]:
    """Numbers of tokens to capture: a step is padded by half of its own tokens or by 15 at most. None for 0."""
    steps = (range(16, 64, 16), range(64, 128, 32), range(128, 512, 64), range(512, 1024, 128))
    sizes = {size for step in steps for size in step} | set(range(1024, largest + 1, 256)) | {largest}
    return sorted(size for size in sizes if 0 < size <= largest)


def piecewise_max_tokens(config: Config) -> int:
    """The most tokens that `config` asks for and a step with prompts can have; 0: no graphs."""
    if not config.piecewise_cuda_graph_max_tokens:
        return 0
    assert config.max_prefill_length is not None
    assert config.max_running_requests is not None
    return min(config.piecewise_cuda_graph_max_tokens, config.max_prefill_length + config.max_running_requests)


Work = Callable[[], object]
Capture = Callable[[Work], Work]  # makes of some work what repeats it


def captured(pool: Any, work: Work) -> Work:
    """What replays the work, which has run before, so that it is compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=CAPTURE_MODE):
        work()
    return graph.replay


@dataclass
class PrefillStep:
    """A step of T tokens: `whole`, or in parts that end before each layer's attention, `start` and `between` layers.

    Its end is for the caller: the last layer from its attention on, for the rows whose logits are wanted.
    """

    decoder: Decoder
    batch: ForwardBatch
    kv: KVCache
    queries: Tensor  # (T, H, hd) written by each part
    heads: Tensor  # (T, H, hd) an attention's result, read by the next part or the caller
    residual: Tensor = field(init=False)  # (T, D)

    def start(self) -> None:
        x, self.residual = self.decoder.embed(self.batch)
        self._write_queries(0, x)

    def between(self, index: int, heads: Tensor) -> None:
        """From layer `index`'s attention to that of the next."""
        x, self.residual = self.decoder.after_attention(index, heads, self.residual, None)
        self._write_queries(index + 1, x)

    def whole(self, attention: PlannedAttention) -> None:
        self.start()
        heads = self.heads
        for index, window in enumerate(self.decoder.spec.windows):
            if index:
                self.between(index - 1, heads)
            heads = attention.run(self.queries, index, window)
        self.heads.copy_(heads)

    def _write_queries(self, index: int, x: Activations) -> None:
        qkv, rope = self.decoder.before_attention(index, x, self.batch, self.kv)
        rope(qkv, out=self.queries)


class PrefillGraphs:
    """Graphs for steps with prompts, captured when this is made, largest first.

    With backends that read every length on the device, a step is one graph. With others, what attention launches
    depends on lengths that only the host knows; then a graph is what lies between two attentions.

    All sizes T use the first T elements of `ids` and `positions` int32 (largest,), `slot_mapping` int64 (largest,),
    `queries` (largest, H, hd), a layer's input to attention, and `heads`, its output between two graphs.
    `capture`: CUDA graphs in one memory pool by default.
    """

    def __init__(
        self, decoder: Decoder, kv: KVCache, tables: DeviceTables, largest: int, capture: Capture | None = None
    ) -> None:
        spec, table = decoder.spec, decoder.weights.embedding
        self.decoder, self.kv = decoder, kv
        self.rows = None
        if StaticRows.captures(decoder.attention):
            self.rows = StaticRows(decoder.attention, kv, tables, min(MAX_CHUNKS, len(tables.length) - 1))
        self.scratch = kv.num_pages * kv.page_size
        self.ids, self.positions = torch.zeros((2, largest), dtype=torch.int32, device=table.device)
        self.slot_mapping = torch.full((largest,), self.scratch, dtype=torch.int64, device=table.device)
        self.queries = torch.zeros((largest, spec.num_heads, spec.head_dim), dtype=table.dtype, device=table.device)
        self.heads = torch.zeros_like(self.queries)
        self.sizes = piecewise_sizes(largest)
        capture = capture or partial(captured, torch.cuda.graph_pool_handle())
        # A step in parts, and the replays of these: number i ends before the attention of layer i.
        self.steps = {size: self._capture(size, capture) for size in reversed(self.sizes)}

    def takes(self, batch: ForwardBatch, metadata: AttentionMetadata) -> bool:
        """Whether the batch is a step with prompts, of whose tokens some are wanted, and fits a size."""
        fits = batch.logits_indices is not None and 0 < len(batch.ids) <= self.sizes[-1]
        return fits and (self.rows is None or self.rows.takes(metadata))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, metadata: AttentionMetadata) -> Tensor:
        """`Decoder.forward` of such a step."""
        tokens = len(batch.ids)
        size = self.sizes[bisect.bisect_left(self.sizes, tokens)]
        step, replays = self.steps[size]
        self.ids[:tokens].copy_(batch.ids)
        self.positions[:tokens].copy_(batch.positions)
        self.slot_mapping[:tokens].copy_(batch.slot_mapping)
        self.slot_mapping[tokens:size].fill_(self.scratch)
        if self.rows is not None:
            self.rows.write(metadata)
            replays[0]()
        else:
            attention = self.decoder.attention.plan(metadata, self.kv)
            for index, replay in enumerate(replays):
                replay()
                heads = attention.run(self.queries[:tokens], index, self.decoder.spec.windows[index])
                step.heads[:tokens].copy_(heads)
        last, heads, residual = self.decoder.spec.num_layers - 1, step.heads[:tokens], step.residual[:tokens]
        hidden, _ = self.decoder.after_attention(last, heads, residual, batch.logits_indices)
        assert isinstance(hidden, Tensor)
        return hidden

    @torch.inference_mode()
    def _capture(self, size: int, capture: Capture) -> tuple[PrefillStep, list[Work]]:
        ids, positions, slot_mapping = self.ids[:size], self.positions[:size], self.slot_mapping[:size]
        batch = ForwardBatch(ids=ids, positions=positions, slot_mapping=slot_mapping, logits_indices=slot_mapping[:0])
        step = PrefillStep(self.decoder, batch, self.kv, self.queries[:size], self.heads[:size])
        parts: list[Work]
        if self.rows is not None:
            parts = [partial(step.whole, self.rows.attention(size))]
        else:
            parts = [step.start]
            parts += [partial(step.between, index, step.heads) for index in range(self.decoder.spec.num_layers - 1)]
        for part in parts[:2]:  # compiles what is not yet compiled
            part()
        return step, [capture(part) for part in parts]
