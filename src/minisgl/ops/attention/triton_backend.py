"""The backend called `triton`: our own kernels, which need nothing but torch and triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisgl.errors import ConfigError
from minisgl.ops.attention.base import PlannedAttention, Rows
from minisgl.ops.attention.device import DeviceRows, GraphDecode, StaticDecode, to_device
from minisgl.ops.kv import KVCache

if TYPE_CHECKING:
    from types import ModuleType


class TritonAttention:
    """Any page size, head dimensions up to 256, float16, bfloat16 and (slowly) float32."""

    def __init__(self, device: torch.device) -> None:
        try:
            from minisgl.ops.kernels import attention
        except ImportError as error:
            raise ConfigError(f"the attention backend triton needs the package triton: {error}") from error
        self.kernels: ModuleType = attention
        # The interpreter has no processors; a few make it split rows as a card would.
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8

    def plan_decode(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Fetch the rows' pages and lengths."""
        there = to_device(rows, kv.page_size)
        return self._decode(there.page_table, there.kv_lens, kv, there.max_kv_len)

    def plan_prefill(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Fetch the chunks' pages and lengths."""
        return _Prefill(self.kernels, to_device(rows, kv.page_size), kv)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        """Decode whose launch depends on the batch and the longest length possible."""
        return StaticDecode(self._decode(page_table, kv_lens, kv, max_seq_len))

    def _decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_kv_len: int) -> PlannedAttention:
        splits = self.kernels.decode_splits(len(kv_lens), kv.k.shape[3], max_kv_len, self.processors)
        return _Decode(self.kernels, page_table, kv_lens, kv, splits)


@dataclass(frozen=True)
class _Decode:
    kernels: ModuleType
    page_table: Tensor
    kv_lens: Tensor
    kv: KVCache
    splits: int

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        k, v = self.kv.k[layer], self.kv.v[layer]
        out: Tensor = self.kernels.decode_attention(
            q, k, v, self.page_table, self.kv_lens, window=window, splits=self.splits
        )
        return out


@dataclass(frozen=True)
class _Prefill:
    kernels: ModuleType
    rows: DeviceRows
    kv: KVCache

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows, k, v = self.rows, self.kv.k[layer], self.kv.v[layer]
        out: Tensor = self.kernels.prefill_attention(
            q, k, v, rows.page_table, rows.cu_query_lens, rows.kv_lens, window=window
        )
        return out
