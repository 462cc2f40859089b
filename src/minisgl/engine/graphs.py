"""A decode step as one CUDA graph: gather rows, decoder, sampling, write back. The host sends `changes` and replays.

A graph is captured for each of some batch sizes; a step takes the smallest that holds it and pads with the tables'
last row, which lives on the scratch page.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.engine.capture import capturing
from minisgl.engine.plan import Int32, StepPlan
from minisgl.engine.tables import DeviceTables
from minisgl.engine.tail import StepOutput
from minisgl.models.decoder import Decoder
from minisgl.models.forward import ForwardBatch
from minisgl.ops.attention.device import GraphBackend, GraphDecode
from minisgl.ops.kernels.step import commit_rows, gather_rows
from minisgl.ops.kv import KVCache
from minisgl.ops.step import StepInputs

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
