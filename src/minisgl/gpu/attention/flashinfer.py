"""The backends of the package FlashInfer (Ye et al., arXiv 2501.01005): `fi`, which plans a step on the host before it
runs, and `trtllm`, TensorRT-LLM's attention, XQA on Hopper and trtllm-gen on Blackwell.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisgl.core.attention import PlannedAttention, SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.core.plan import Int32
from minisgl.gpu.attention.interface import DeviceBackend, DeviceBatch, GraphDecode, load_library

WORKSPACE_BYTES = 256 * 2**20
TRTLLM_WORKSPACE_BYTES = 128 * 2**20
GRAPH_PLAN_BYTES = 2**20  # for a captured batch: some dozens of bytes per work item, at most two per multiprocessor
CUDA_CORE_ROWS = 64  # with fewer rows,
CUDA_CORE_GROUP = 2  # and at most so many query heads per KV head, decode is faster without tensor cores
NO_SPLIT_PROGRAMS = 2  # from so many pairs of row and KV head per multiprocessor on, no row is split


def decode_kind(rows: int, group: int) -> str:
    return "decode-tensor" if group > CUDA_CORE_GROUP or rows >= CUDA_CORE_ROWS else "decode-cuda"


class FlashInfer:
    """float16 and bfloat16, head dimensions 64, 128 and 256. One step at a time, all on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.library = load_library("flashinfer", "flashinfer-python")
        self.kernels = importlib.import_module("minisgl.gpu.kernels.attention")
        self.device = device
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.hopper = torch.cuda.get_device_capability(device)[0] == 9
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self.planners_of: dict[tuple[str, int], AlternatingPlanners] = {}

    def plan(self, rows: SequenceBatch, kv: KVCache, decode: bool) -> PlannedAttention:
        return FlashInferStep(self, rows, kv, decode)

    def graph_decode(self, rows: DeviceBatch, kv: KVCache) -> GraphDecode:
        step = FlashInferGraphStep(self, rows.page_table, rows.kv_lens, kv)
        return GraphDecode(step, step.prepare)

    def wrapper(self, kind: str, head_dim: int, window: int, **options: Any) -> Any:
        """A new planner of a kind: `prefill`, `decode-cuda` or `decode-tensor` (cores)."""
        if kind == "prefill":
            # FlashInfer's Hopper template takes minutes to compile where it does not come compiled, as for windows.
            backend = "fa3" if self.hopper and head_dim == 128 and not window else "fa2"
            return self.library.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "NHD", backend=backend)
        return self.library.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "NHD", use_tensor_cores=kind == "decode-tensor", backend="fa2", **options
        )


class AlternatingPlanners:
    """Two planners of one kind that are used alternately.

    A plan is copied to the device from the planner's own pinned memory, in stream order. The host may write the next
    plan there only when that copy is done.
    """

    def __init__(self, wrappers: list[Any]) -> None:
        self.wrappers = wrappers
        self.copied = (torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        self.index = 0

    def plan(self, *args: Any, **options: Any) -> Any:
        """Plan with the next planner, and return it; its plan stays valid during the next call."""
        self.index = 1 - self.index
        self.copied[self.index].synchronize()
        self.wrappers[self.index].plan(*args, **options)
        self.copied[self.index].record()
        return self.wrappers[self.index]


class FlashInferStep(PlannedAttention):
    """One step outside graphs. The first layer with a window makes the plan for it."""

    def __init__(self, owner: FlashInfer, rows: SequenceBatch, kv: KVCache, decode: bool) -> None:
        self.owner, self.rows, self.kv, self.decode = owner, rows, kv, decode
        self.planned: dict[int, Any] = {}  # by window
        self.starts = _starts(-(-rows.kv_lens // kv.page_size))  # of each row's pages, on the host
        self.pages = torch.empty(int(self.starts[-1]), dtype=torch.int32, device=owner.device)
        unused = torch.empty(2, len(self.starts), dtype=torch.int32, device=owner.device)
        owner.kernels.flatten_pages(
            rows.page_table, rows.kv_lens_device, kv.page_size, unused[0], self.pages, unused[1]
        )

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        if window not in self.planned:
            self.planned[window] = self._plan(q, window)
        out: Tensor = self.planned[window].run(q, (self.kv.k[layer], self.kv.v[layer]))
        return out

    def _plan(self, q: Tensor, window: int) -> Any:
        (heads, head_dim), (page_size, kv_heads) = q.shape[1:], self.kv.k.shape[2:4]
        kind = decode_kind(len(q), heads // kv_heads) if self.decode else "prefill"
        planners = self.owner.planners_of.get((kind, window))
        if planners is None:
            planners = AlternatingPlanners([self.owner.wrapper(kind, head_dim, window) for _ in range(2)])
            self.owner.planners_of[kind, window] = planners
        filled = ((self.rows.kv_lens - 1) % page_size + 1).astype(np.int32)  # tokens in each row's last page
        pages = _pinned(self.starts), self.pages, _pinned(filled)
        shape, options = (heads, kv_heads, head_dim, page_size), _options(q.dtype, window)
        if self.decode:
            return planners.plan(*pages, *shape, **options)
        return planners.plan(_pinned(_starts(self.rows.query_lens)), *pages, *shape, causal=True, **options)


class FlashInferGraphStep(PlannedAttention):
    """Decode of a fixed batch over static tensors.

    The graph itself flattens the page table, so the host plans only how rows are split. Many rows are not split and
    are planned once; few are planned again when a row enters a new page.
    """

    def __init__(self, owner: FlashInfer, page_table: Tensor, kv_lens: Tensor, kv: KVCache) -> None:
        self.owner, self.page_table, self.kv_lens, self.kv = owner, page_table, kv_lens, kv
        rows, device = len(kv_lens), kv_lens.device
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.filled = torch.ones(rows, dtype=torch.int32, device=device)
        self.pages = torch.zeros(page_table.numel(), dtype=torch.int32, device=device)
        self.fixed = rows * kv.k.shape[3] >= NO_SPLIT_PROGRAMS * owner.processors
        self.counts: Int32 = np.ones(rows, np.int32)
        self.planners: dict[int, GraphPlanner] = {}  # by window

    def prepare(self, kv_lens: Int32) -> None:
        counts = (-(-kv_lens // self.kv.page_size)).astype(np.int32)
        if not self.fixed and not np.array_equal(counts, self.counts):
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
        (heads, head_dim), (page_size, kv_heads), owner = q.shape[1:], step.kv.k.shape[2:4], step.owner
        self.shape = (heads, kv_heads, head_dim, page_size)
        self.options = _options(q.dtype, window)
        if step.fixed:
            self.wrapper = owner.wrapper("decode-tensor", head_dim, window)
            self.wrapper.plan(step.starts, step.pages, step.filled, *self.shape, disable_split_kv=True, **self.options)
            return
        self.wrapper = owner.wrapper(
            decode_kind(len(q), heads // kv_heads), head_dim, window, use_cuda_graph=True,
            paged_kv_indptr_buffer=step.starts, paged_kv_indices_buffer=step.pages,
            paged_kv_last_page_len_buffer=step.filled,
        )  # fmt: skip
        plan_buffer = torch.empty(GRAPH_PLAN_BYTES, dtype=torch.uint8, device=owner.device)
        self.wrapper.reset_workspace_buffer(owner.workspace, plan_buffer)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.wrapper.plan(*self._rows(step.counts), *self.shape, **self.options)
        self.copied.record()

    def plan(self, counts: Int32) -> None:
        """Plan again, without the copies of a first plan: the graph itself fills starts, pages and filled."""
        self.copied.synchronize()  # the previous plan has left its pinned memory
        rows, plan = self._rows(counts), importlib.import_module("flashinfer.decode").fast_decode_plan
        plan(self.wrapper, *rows, *self.shape, global_override_indptr_cpu=rows[0], **self.options)
        self.copied.record()

    def _rows(self, counts: Int32) -> tuple[Tensor, Tensor, Tensor]:
        filled = torch.full((len(counts),), self.shape[-1], dtype=torch.int32)
        return torch.from_numpy(_starts(counts)), torch.empty(0, dtype=torch.int32), filled


class TensorRTLLM(DeviceBackend):
    """float16 and bfloat16, pages of 16, 32 or 64 tokens, head dimensions that are a multiple of 16 up to 256.

    trtllm-gen's prefill exists on Blackwell only; on other GPUs `select.py` takes FlashInfer's own kernels for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.library = load_library("flashinfer", "flashinfer-python")
        # The kernels' counters start at zero, and each launch leaves them at zero.
        self.workspace = torch.zeros(TRTLLM_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def step(self, rows: DeviceBatch, kv: KVCache, decode: bool) -> PlannedAttention:
        return TensorRTLLMStep(self.library, self.workspace, rows, kv, decode)


@dataclass(frozen=True)
class TensorRTLLMStep(PlannedAttention):
    library: ModuleType
    workspace: Tensor
    rows: DeviceBatch
    kv: KVCache
    decode: bool

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows, lens = self.rows, self.rows.kv_lens
        operands = (q.contiguous(), (self.kv.k[layer], self.kv.v[layer]), self.workspace, rows.page_table, lens)
        options: dict[str, Any] = {"bmm1_scale": q.shape[-1] ** -0.5, "bmm2_scale": 1.0, "kv_layout": "NHD"}
        options["window_left"] = window - 1 if window else -1
        out: Tensor
        if self.decode:
            out = self.library.decode.trtllm_batch_decode_with_kv_cache(*operands, rows.max_kv_len, **options)
            return out
        ends = torch.cumsum(lens, 0, dtype=torch.int32)
        out = self.library.prefill.trtllm_batch_context_with_kv_cache(
            *operands, rows.max_query_len, rows.max_kv_len, batch_size=len(lens), cum_seq_lens_q=rows.cu_query_lens,
            cum_seq_lens_kv=torch.nn.functional.pad(ends, (1, 0)), **options,
        )  # fmt: skip
        return out


def _options(dtype: torch.dtype, window: int) -> dict[str, Any]:
    return {"q_data_type": dtype, "kv_data_type": dtype, "window_left": window - 1 if window else -1}


def _starts(counts: Int32) -> Int32:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _pinned(array: Int32) -> Tensor:
    return torch.from_numpy(array).pin_memory()
