"""What the GPU backends share: a step's rows as device tensors, and decode attention that a CUDA graph can capture."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minisgl.core.attention import Attention, AttentionBackend, PlannedAttention, SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.core.plan import Int32
from minisgl.errors import ConfigError

# On an H200: up to so many pairs of row and KV head, programs always share out the work of decode rows.
SHARED_PAIRS = 799
# With more, each pair may have a program of its own if all hold the tokens of at least so many of the longest.
EVEN_PAIRS = 256


@dataclass(frozen=True)
class DeviceBatch:
    """Rows as kernels read them. Only the two maxima, and `even`, are known on the host."""

    page_table: Tensor  # int32 (rows, pages), contiguous; as wide as the longest row needs, or wider
    kv_lens: Tensor  # int32 (rows,)
    cu_query_lens: Tensor  # int32 (rows + 1,)
    max_query_len: int
    max_kv_len: int
    even: bool = False  # of decodes: as `are_even`; otherwise programs share the work on a long row


def are_even(kv_lens: Int32, kv_heads: int) -> bool:
    """Whether decode rows of these lengths, each a program for each KV head, keep a GPU busy until all are done."""
    return kv_heads * int(kv_lens.sum()) >= EVEN_PAIRS * int(kv_lens.max())


def device_batch(rows: SequenceBatch, even: bool = False) -> DeviceBatch:
    longest, longest_kv = int(rows.query_lens.max()), int(rows.kv_lens.max())
    return DeviceBatch(rows.page_table, rows.kv_lens_device, rows.cu_query_lens, longest, longest_kv, even)


def decode_batch(page_table: Tensor, kv_lens: Tensor, max_kv_len: int, even: bool = True) -> DeviceBatch:
    """Rows with one query each."""
    starts = torch.arange(len(kv_lens) + 1, dtype=torch.int32, device=kv_lens.device)
    return DeviceBatch(page_table, kv_lens, starts, 1, max_kv_len, even)


def load_library(module: str, package: str) -> ModuleType:
    """A module of a package that may be missing, or may not fit the machine. Raises ConfigError then."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ConfigError(f"the attention package {package} cannot be loaded: {error}") from error


@dataclass(frozen=True)
class GraphDecode:
    """Decode attention over static tensors, for one CUDA graph.

    `attention` is what to capture. It reads the static tensors alone. Layer 0 begins a step, and the layers follow in
    order. Run it once before the capture, after a `prepare`; of a `DeviceBackend` only the largest: workspaces appear.
    """

    attention: PlannedAttention
    prepare: Callable[[Int32], None]  # before each run or replay, with the host's copy of what the static lengths hold


@runtime_checkable
class GraphBackend(AttentionBackend, Protocol):
    """A backend whose decode can be captured."""

    def graph_decode(self, rows: DeviceBatch, kv: KVCache) -> GraphDecode:
        """Decode for a graph, of a `decode_batch` whose tensors are static.

        Rows that pad the batch have length 1 and a line of the page table full of the scratch page.
        """


class DeviceBackend(ABC):
    """A backend whose kernels read every length on the device, so a graph's step is a step like any other."""

    captures_prefill = False  # whether that holds of chunks too, whose maxima may be larger than they are

    @abstractmethod
    def step(self, rows: DeviceBatch, kv: KVCache, decode: bool) -> PlannedAttention: ...

    def plan(self, rows: SequenceBatch, kv: KVCache, decode: bool) -> PlannedAttention:
        even = decode and are_even(rows.kv_lens, kv.k.shape[3])
        return self.step(device_batch(rows, even), kv, decode)

    def graph_decode(self, rows: DeviceBatch, kv: KVCache) -> GraphDecode:
        return GraphDecode(self.step(rows, kv, decode=True), prepare=lambda kv_lens: None)


def captures_prefill(attention: Attention) -> bool:
    """Whether a graph can hold a whole step with prompts, as `static_step` plans it."""
    decode, prefill = attention.decode, attention.prefill
    return isinstance(decode, DeviceBackend) and isinstance(prefill, DeviceBackend) and prefill.captures_prefill


def static_step(attention: Attention, decodes: DeviceBatch, chunks: DeviceBatch, kv: KVCache) -> PlannedAttention:
    """Attention of decode rows, then chunks, for a graph. Rows of length 0 pad both; no query is one of theirs."""
    decode, prefill, rows = attention.decode, attention.prefill, len(decodes.kv_lens)
    assert isinstance(decode, DeviceBackend)
    assert isinstance(prefill, DeviceBackend)
    first = decode.step(decodes, kv, decode=True) if rows else None
    return _StaticStep(first, prefill.step(chunks, kv, decode=False), rows, chunks.cu_query_lens)


@dataclass(frozen=True)
class _StaticStep(PlannedAttention):
    decode: PlannedAttention | None
    prefill: PlannedAttention
    rows: int  # decode rows at most
    starts: Tensor  # int32 (C + 1,)

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        from minisgl.gpu.kernels.attention import merge_rows  # a machine without a GPU may lack triton

        ones, out = q[: self.rows], self.prefill.run(q, layer, window)
        if self.decode is not None:
            ones = self.decode.run(ones, layer, window)
        merge_rows(ones, out, self.starts)
        return out
