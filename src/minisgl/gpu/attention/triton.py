"""The backend called `triton`: our own kernels."""

from __future__ import annotations

import torch

from minisgl.core.attention import PlannedAttention
from minisgl.core.kv_cache import KVCache
from minisgl.gpu.attention.interface import DeviceBackend, DeviceBatch


class TritonAttention(DeviceBackend):
    """Any page size, head dimensions up to 256, float16, bfloat16 and (slowly) float32."""

    captures_prefill = True

    def __init__(self, device: torch.device) -> None:
        from minisgl.gpu.kernels import attention, decode  # a machine without a GPU may lack triton

        self.prefill_attention, self.decode_attention = attention.PrefillAttention, decode.DecodeAttention
        self.workspaces = decode.Workspaces(device)
        # The interpreter has no multiprocessors; a few make it split rows as a GPU would.
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8

    def step(self, rows: DeviceBatch, kv: KVCache, decode: bool) -> PlannedAttention:
        if decode:
            return self.decode_attention(rows, kv, self.workspaces, self.processors)
        return self.prefill_attention(rows.page_table, rows.cu_query_lens, rows.kv_lens, kv)
