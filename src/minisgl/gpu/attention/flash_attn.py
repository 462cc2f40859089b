"""The backend called `fa`: FlashAttention 3 (Shah et al., arXiv 2407.08608)."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from minisgl.core.attention import PlannedAttention
from minisgl.core.kv_cache import KVCache
from minisgl.core.quantization import FP8, to_fp8
from minisgl.gpu.attention.interface import DeviceBackend, DeviceBatch, load_library

ONE_SPLIT_PAIRS = 256  # so many pairs of decode row and KV head fill the GPU: splitting a row only adds a merge


class FlashAttention(DeviceBackend):
    """Hopper, float16 and bfloat16, head dimensions up to 256, any page size."""

    captures_prefill = True

    def __init__(self) -> None:
        self.library = load_library("flash_attn_interface", "flash-attn-3")

    def step(self, rows: DeviceBatch, kv: KVCache, decode: bool) -> PlannedAttention:
        return FlashAttentionStep(self.library, rows, kv, decode)


@dataclass(frozen=True)
class FlashAttentionStep(PlannedAttention):
    """One step; its first layer schedules the work for all layers. With keys and values in FP8 queries are, too."""

    library: ModuleType
    rows: DeviceBatch
    kv: KVCache
    decode: bool
    schedules: dict[int, Tensor] = field(default_factory=dict)  # by window: which multiprocessor computes what

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows, pairs = self.rows, len(self.rows.kv_lens) * self.kv.k.shape[3]
        options: dict[str, Any] = {
            "cu_seqlens_q": None if self.decode else rows.cu_query_lens,
            "causal": True,
            "window_size": (window - 1, 0) if window else (-1, -1),  # tokens to the left and right, -1: all
            "num_splits": 1 if self.decode and rows.even and pairs >= ONE_SPLIT_PAIRS else 0,  # 0: the library's choice
        }
        dtype = q.dtype
        if self.kv.k.dtype == FP8:
            q = to_fp8(q)
        if layer == 0:
            self.schedules.clear()  # a captured step schedules anew in each replay, from the lengths of the moment
        if window not in self.schedules:
            page_size, kv_heads = self.kv.k.shape[2:4]
            self.schedules[window] = self.library.get_scheduler_metadata(
                len(rows.kv_lens), rows.max_query_len, rows.page_table.shape[1] * page_size, q.shape[1], kv_heads,
                q.shape[2], rows.kv_lens, qkv_dtype=q.dtype, page_size=page_size, **options,
            )  # fmt: skip
        out: Tensor = self.library.flash_attn_with_kvcache(
            q.unsqueeze(1) if self.decode else q, self.kv.k[layer], self.kv.v[layer], cache_seqlens=rows.kv_lens,
            page_table=rows.page_table, max_seqlen_q=None if self.decode else rows.max_query_len,
            scheduler_metadata=self.schedules[window], **options,
        )  # fmt: skip
        out = out.to(dtype)
        return out.squeeze(1) if self.decode else out
