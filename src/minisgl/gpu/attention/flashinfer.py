"""The backend called `fi`: FlashInfer (Ye et al., arXiv 2501.01005), which plans a step on the host before it runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.core.attention import Int32, PlannedAttention, SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.errors import ConfigError
from minisgl.gpu.attention.interface import GraphDecode, to_device

WORKSPACE_BYTES = 256 * 2**20
GRAPH_PLAN_BYTES = 2**20
"""For a captured batch's plan: some dozens of bytes per work item, at most two items per multiprocessor."""
CUDA_CORE_ROWS = 64
CUDA_CORE_GROUP = 2
"""With fewer rows, and at most so many query heads per KV head, decode is faster without tensor cores."""
NO_SPLIT_PROGRAMS = 2
"""From so many pairs of row and KV head per multiprocessor on, no row is split: then one plan serves every step."""


def load_flashinfer() -> ModuleType:
    """Raises ConfigError when the package cannot be loaded."""
    try:
        return importlib.import_module("flashinfer")
    except (ImportError, OSError) as error:
        raise ConfigError(f"FlashInfer (package flashinfer-python) cannot be loaded: {error}") from error


def wants_tensor_cores(rows: int, group: int) -> bool:
    """Whether decode of so many rows, with `group` query heads per KV head, is faster on tensor cores."""
    return group > CUDA_CORE_GROUP or rows >= CUDA_CORE_ROWS


class FlashInfer:
    """float16 and bfloat16, head dimensions 64, 128 and 256. One step at a time, all on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.library = load_flashinfer()
        self.kernels = importlib.import_module("minisgl.gpu.kernels.attention")
        self.device = device
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.hopper = torch.cuda.get_device_capability(device)[0] == 9
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.planners_of: dict[tuple[str, int], AlternatingPlanners] = {}

    def plan_decode(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return FlashInferStep(self, rows, kv, *self.flatten(rows, kv), decode=True)

    def plan_prefill(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return FlashInferStep(self, rows, kv, *self.flatten(rows, kv), decode=False)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        return FlashInferGraphStep(self, page_table, kv_lens, kv)

    def flatten(self, rows: SequenceBatch, kv: KVCache) -> tuple[Int32, Tensor]:
        """The index of each row's first page (rows + 1,), on the host, and all pages, int32 on the device."""
        starts = np.concatenate([[0], np.cumsum(-(-rows.kv_lens // kv.page_size))]).astype(np.int32)
        on_device = to_device(rows, kv.page_size)
        pages = torch.empty(int(starts[-1]), dtype=torch.int32, device=self.device)
        unused = torch.empty(2, len(starts), dtype=torch.int32, device=self.device)
        self.kernels.flatten_pages(on_device.page_table, on_device.kv_lens, kv.page_size, unused[0], pages, unused[1])
        return starts, pages

    def wrapper(self, kind: str, head_dim: int, window: int) -> Any:
        """A new planner of a kind: `prefill`, `decode-cuda` or `decode-tensor` (cores)."""
        if kind == "prefill":
            # FlashInfer's Hopper template takes minutes to compile where it does not come compiled, as for windows.
            backend = "fa3" if self.hopper and head_dim == 128 and not window else "fa2"
            return self.library.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=backend)
        return self.library.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_tensor_cores=kind == "decode-tensor", backend="fa2"
        )


class AlternatingPlanners:
    """Two planners of one kind that are used alternately.

    A plan is copied to the device from the planner's own pinned memory, in stream order. The host may write the next
    plan there only when that copy is done.
    """

    def __init__(self, wrappers: list[Any]) -> None:
        self.wrappers = wrappers
        self.copied = (_event(), _event())
        self.turn = 0

    def plan(self, *args: Any, **options: Any) -> Any:
        """Plan with the next planner, and return it; its plan stays valid during the next call."""
        self.turn = 1 - self.turn
        self.copied[self.turn].synchronize()
        self.wrappers[self.turn].plan(*args, **options)
        self.copied[self.turn].record()
        return self.wrappers[self.turn]


@dataclass
class FlashInferStep:
    """One step outside graphs. The first layer with a window makes the plan for it."""

    owner: FlashInfer
    rows: SequenceBatch
    kv: KVCache
    starts: Int32
    pages: Tensor
    decode: bool
    planned: dict[int, Any] = field(default_factory=dict)  # by window

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        if window not in self.planned:
            self.planned[window] = self._plan(q, window)
        out: Tensor = self.planned[window].run(q, (self.kv.k[layer], self.kv.v[layer]))
        return out

    def _plan(self, q: Tensor, window: int) -> Any:
        (heads, head_dim), (page_size, kv_heads) = q.shape[1:], self.kv.k.shape[2:4]
        kind = "prefill"
        if self.decode:
            kind = "decode-tensor" if wants_tensor_cores(len(q), heads // kv_heads) else "decode-cuda"
        key = (kind, window)
        if key not in self.owner.planners_of:
            wrappers = [self.owner.wrapper(kind, head_dim, window) for _ in range(2)]
            self.owner.planners_of[key] = AlternatingPlanners(wrappers)
        pages = _pinned(self.starts), self.pages, _pinned(_filled(self.rows.kv_lens, page_size))
        shape, options = (heads, kv_heads, head_dim, page_size), _options(q.dtype, window)
        if self.decode:
            return self.owner.planners_of[key].plan(*pages, *shape, **options)
        starts = _pinned(np.concatenate([[0], np.cumsum(self.rows.query_lens)]).astype(np.int32))
        return self.owner.planners_of[key].plan(starts, *pages, *shape, causal=True, **options)


class FlashInferGraphStep:
    """Decode of a fixed batch over static tensors.

    The graph itself flattens the page table, so the host plans only how rows are split. Many rows are not split and
    are planned once; few are planned again when a row enters a new page.
    """

    def __init__(self, owner: FlashInfer, page_table: Tensor, kv_lens: Tensor, kv: KVCache) -> None:
        self.owner, self.page_table, self.kv_lens, self.kv = owner, page_table, kv_lens, kv
        rows = len(kv_lens)
        device = kv_lens.device
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.filled = torch.ones(rows, dtype=torch.int32, device=device)
        self.pages = torch.zeros(page_table.numel(), dtype=torch.int32, device=device)
        self.fixed = rows * kv.k.shape[3] >= NO_SPLIT_PROGRAMS * owner.processors
        self.counts: Int32 = np.ones(rows, np.int32)
        self.planners: dict[int, GraphPlanner] = {}  # by window

    @property
    def attention(self) -> PlannedAttention:
        return self

    def prepare(self, kv_lens: Int32) -> None:
        counts = (-(-kv_lens // self.kv.page_size)).astype(np.int32)
        if np.array_equal(counts, self.counts):
            return
        self.counts = counts
        for planner in self.planners.values():
            planner.plan(counts)

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        new = window not in self.planners
        if new:
            self.planners[window] = GraphPlanner(self, q, window)
        if new or layer == 0:  # a first plan overwrites these tensors too
            self.owner.kernels.flatten_pages(
                self.page_table, self.kv_lens, self.kv.page_size, self.starts, self.pages, self.filled
            )
        out: Tensor = self.planners[window].wrapper.run(q, (self.kv.k[layer], self.kv.v[layer]))
        return out


class GraphPlanner:
    """A planner over a graph's static lengths and pages."""

    def __init__(self, step: FlashInferGraphStep, q: Tensor, window: int) -> None:
        (heads, head_dim), (page_size, kv_heads) = q.shape[1:], step.kv.k.shape[2:4]
        owner = step.owner
        self.shape = (heads, kv_heads, head_dim, page_size)
        self.options = _options(q.dtype, window)
        self.fixed = step.fixed
        if self.fixed:
            self.wrapper = owner.wrapper("decode-tensor", head_dim, window)
            self.wrapper.plan(step.starts, step.pages, step.filled, *self.shape, disable_split_kv=True, **self.options)
            return
        self.wrapper = owner.library.BatchDecodeWithPagedKVCacheWrapper(
            owner.workspace, "NHD", use_cuda_graph=True, backend="fa2",
            use_tensor_cores=wants_tensor_cores(len(q), heads // kv_heads), paged_kv_indptr_buffer=step.starts,
            paged_kv_indices_buffer=step.pages, paged_kv_last_page_len_buffer=step.filled,
        )  # fmt: skip
        plan_buffer = torch.empty(GRAPH_PLAN_BYTES, dtype=torch.uint8, device=owner.device)
        self.wrapper.reset_workspace_buffer(owner.workspace, plan_buffer)
        self.copied = _event()
        self._plan(self.wrapper.plan, step.counts)

    def plan(self, counts: Int32) -> None:
        if not self.fixed:
            self.copied.synchronize()  # the previous plan has left its pinned memory
            self._plan(self._plan_fast, counts)

    def _plan_fast(self, starts: Tensor, pages: Tensor, filled: Tensor, *shape: int, **options: Any) -> None:
        """FlashInfer's plan without its copies: the graph itself fills starts, pages and filled on the device."""
        decode = importlib.import_module("flashinfer.decode")
        decode.fast_decode_plan(
            self.wrapper, starts, pages, filled, *shape, global_override_indptr_cpu=starts, **options
        )

    def _plan(self, plan: Any, counts: Int32) -> None:
        _, _, _, page_size = self.shape
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        filled = torch.full((len(counts),), page_size, dtype=torch.int32)
        plan(starts, torch.empty(0, dtype=torch.int32), filled, *self.shape, **self.options)
        self.copied.record()


def _options(dtype: torch.dtype, window: int) -> dict[str, Any]:
    return {"q_data_type": dtype, "kv_data_type": dtype, "window_left": window - 1 if window else -1}


def _filled(kv_lens: Int32, page_size: int) -> Int32:
    return ((kv_lens - 1) % page_size + 1).astype(np.int32)


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _pinned(array: Int32) -> Tensor:
    return torch.from_numpy(array).pin_memory()
