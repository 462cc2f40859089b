"""What the GPU backends share: a step's rows as device tensors, and decode attention that a CUDA graph can capture."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from minisgl.core.attention import (
    Attention,
    AttentionBackend,
    AttentionMetadata,
    Int32,
    PlannedAttention,
    SequenceBatch,
)
from minisgl.core.kv_cache import DeviceTables, KVCache
from minisgl.errors import ConfigError


@dataclass(frozen=True)
class DeviceBatch:
    """Rows as kernels read them. Only the two maxima are numbers on the host."""

    page_table: Tensor  # int32 (rows, pages), contiguous; as wide as the longest row needs, or wider
    kv_lens: Tensor  # int32 (rows,)
    cu_query_lens: Tensor  # int32 (rows + 1,)
    max_query_len: int
    max_kv_len: int


def to_device(rows: SequenceBatch, page_size: int) -> DeviceBatch:
    """The rows' own lines of the page table, and their lengths. Copies from the host only what `rows` leaves None."""
    device = rows.page_table.device
    max_kv_len = int(rows.kv_lens.max())
    slots, lens, starts = rows.slots_device, rows.kv_lens_device, rows.cu_query_lens
    if slots is None:
        slots = torch.from_numpy(rows.slots.astype(np.int64)).to(device)
    if lens is None:
        lens = torch.from_numpy(rows.kv_lens.astype(np.int32)).to(device)
    if starts is None:
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(rows.query_lens)]).astype(np.int32)).to(device)
    table = rows.page_table[:, : -(-max_kv_len // page_size)].index_select(0, slots)
    return DeviceBatch(table, lens, starts, int(rows.query_lens.max()), max_kv_len)


def load_library(module: str, package: str) -> ModuleType:
    """A module of a package that may be missing, or may not fit the machine. Raises ConfigError then."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ConfigError(f"the attention package {package} cannot be loaded: {error}") from error


class GraphDecode(Protocol):
    """Decode attention over static tensors, for one CUDA graph.

    `attention` is what to capture. It reads the static tensors alone. Layer 0 begins a step, and the layers follow in
    order. Run it once before the capture, after a `prepare`: kernels compile and workspaces appear then.
    """

    @property
    def attention(self) -> PlannedAttention: ...

    def prepare(self, kv_lens: Int32) -> None:
        """To be called before each run or replay, with the host's copy of what the static lengths will hold."""


@runtime_checkable
class GraphBackend(AttentionBackend, Protocol):
    """A backend whose decode can be captured."""

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        """Decode of B rows for a graph: page_table int32 (B, max_pages) and kv_lens int32 (B,), static and contiguous.

        Rows that pad the batch have length 1 and a line of the page table full of the scratch page.
        """


@dataclass(frozen=True)
class StaticDecode:
    """A GraphDecode that the host need not prepare: the kernels read every length on the device."""

    attention: PlannedAttention

    def prepare(self, kv_lens: Int32) -> None:
        pass


class DeviceBackend(ABC):
    """A backend whose kernels read every length on the device, so a graph's step is a step like any other."""

    captures_prefill = False  # whether that holds of chunks too, whose maxima may be larger than they are

    @abstractmethod
    def step(self, rows: DeviceBatch, kv: KVCache, decode: bool) -> PlannedAttention: ...

    def plan_decode(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return self.step(to_device(rows, kv.page_size), kv, decode=True)

    def plan_prefill(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return self.step(to_device(rows, kv.page_size), kv, decode=False)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        starts = torch.arange(len(kv_lens) + 1, dtype=torch.int32, device=kv_lens.device)
        return StaticDecode(self.step(DeviceBatch(page_table, kv_lens, starts, 1, max_seq_len), kv, decode=True))


class StaticRows:
    """The attention of any step of up to R decode rows and C chunks, for CUDA graphs: all it reads stays where it is.

    Rows that pad it read one token, and chunks none.
    """

    def __init__(self, attention: Attention, kv: KVCache, tables: DeviceTables, chunks: int) -> None:
        """`attention`: as `captures` accepts."""
        self.kv, self.tables = kv, tables
        (rows, pages), device = tables.page_table.shape, tables.page_table.device
        self.max_kv_len = pages * kv.page_size
        self.backends = cast(DeviceBackend, attention.decode), cast(DeviceBackend, attention.prefill)
        self.decode_pages = torch.full((rows - 1, pages), kv.num_pages, dtype=torch.int32, device=device)
        self.decode_lens = torch.ones(rows - 1, dtype=torch.int32, device=device)
        self.decode_starts = torch.arange(rows, dtype=torch.int32, device=device)
        self.decodes = torch.zeros(rows - 1, dtype=torch.bool, device=device)  # the first tokens of the step that are
        self.chunk_pages = torch.full((chunks, pages), kv.num_pages, dtype=torch.int32, device=device)
        self.chunk_lens = torch.zeros(chunks, dtype=torch.int32, device=device)
        self.chunk_starts = torch.zeros(chunks + 1, dtype=torch.int32, device=device)

    @staticmethod
    def captures(attention: Attention) -> bool:
        decode, prefill = attention.decode, attention.prefill
        return isinstance(decode, DeviceBackend) and isinstance(prefill, DeviceBackend) and prefill.captures_prefill

    def takes(self, metadata: AttentionMetadata) -> bool:
        return metadata.prefill is not None and len(metadata.prefill.slots) <= len(self.chunk_lens)

    def attention(self, tokens: int) -> PlannedAttention:
        """What to capture, for steps of up to so many tokens."""
        rows, (decode, prefill) = min(tokens, len(self.decode_lens)), self.backends
        ones = DeviceBatch(
            self.decode_pages[:rows], self.decode_lens[:rows], self.decode_starts[: rows + 1], 1, self.max_kv_len
        )
        chunks = DeviceBatch(self.chunk_pages, self.chunk_lens, self.chunk_starts, tokens, self.max_kv_len)
        return _StaticStep(
            decode.step(ones, self.kv, decode=True), prefill.step(chunks, self.kv, decode=False), self.decodes[:rows]
        )

    def write(self, metadata: AttentionMetadata) -> None:
        """Make the next replays those of a step."""
        rows = 0 if metadata.decode is None else len(metadata.decode.slots)
        if metadata.decode is not None:
            self._write(metadata.decode, self.decode_pages, self.decode_lens)
        self.decode_lens[rows:].fill_(1)
        self.decodes[:rows].fill_(True)
        self.decodes[rows:].fill_(False)
        prefill = metadata.prefill
        assert prefill is not None
        assert prefill.cu_query_lens is not None
        chunks = len(prefill.slots)
        self._write(prefill, self.chunk_pages, self.chunk_lens)
        self.chunk_lens[chunks:].fill_(0)
        torch.add(prefill.cu_query_lens, rows, out=self.chunk_starts[: chunks + 1])
        self.chunk_starts[chunks + 1 :].fill_(rows + int(prefill.query_lens.sum()))

    def _write(self, rows: SequenceBatch, pages: Tensor, lens: Tensor) -> None:
        assert rows.slots_device is not None
        assert rows.kv_lens_device is not None
        count = len(rows.slots)
        torch.index_select(self.tables.page_table, 0, rows.slots_device, out=pages[:count])
        lens[:count].copy_(rows.kv_lens_device)


@dataclass(frozen=True)
class _StaticStep:
    decode: PlannedAttention
    prefill: PlannedAttention
    decodes: Tensor  # bool (R,)

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows = len(self.decodes)
        ones, out = self.decode.run(q[:rows], layer, window), self.prefill.run(q, layer, window)
        torch.where(self.decodes[:, None, None], ones, out[:rows], out=out[:rows])
        return out
