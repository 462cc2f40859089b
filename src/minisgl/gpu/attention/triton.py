"""The backend called `triton`: our own kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.core.attention import PlannedAttention, SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.gpu.attention.interface import DeviceBatch, GraphDecode, StaticDecode, to_device


class TritonAttention:
    """Any page size, head dimensions up to 256, float16, bfloat16 and (slowly) float32."""

    def __init__(self, device: torch.device) -> None:
        from minisgl.gpu.kernels import attention, decode  # a machine without a GPU may lack triton

        self.prefill_attention, self.decode_attention = attention.prefill_attention, decode.DecodeAttention
        self.workspaces = decode.Workspaces(device)
        # The interpreter has no multiprocessors; a few make it split rows as a GPU would.
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8

    def plan_decode(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        on_device = to_device(rows, kv.page_size)
        return self._decode(on_device.page_table, on_device.kv_lens, kv)

    def plan_prefill(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return TritonPrefill(self.prefill_attention, to_device(rows, kv.page_size), kv)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        return StaticDecode(self._decode(page_table, kv_lens, kv))

    def _decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache) -> PlannedAttention:
        return self.decode_attention(page_table, kv_lens, kv, self.workspaces, self.processors)


@dataclass(frozen=True)
class TritonPrefill:
    kernel: Callable[..., Tensor]
    rows: DeviceBatch
    kv: KVCache

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows, k, v = self.rows, self.kv.k[layer], self.kv.v[layer]
        return self.kernel(q, k, v, rows.page_table, rows.cu_query_lens, rows.kv_lens, window)
