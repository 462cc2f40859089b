"""The backend called `trtllm`: TensorRT-LLM's attention through FlashInfer, XQA on Hopper and trtllm-gen on Blackwell.

trtllm-gen's prefill exists on Blackwell only; elsewhere `select` puts FlashInfer's own kernels in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from minisgl.core.attention import DeviceRows, GraphDecode, PlannedAttention, Rows, StaticDecode, to_device
from minisgl.core.kv_cache import KVCache
from minisgl.gpu.attention.flashinfer import load_flashinfer

PAGE_SIZES = (16, 32, 64)
WORKSPACE_BYTES = 128 * 2**20


class TensorRTLLM:
    """float16 and bfloat16, pages of 16, 32 or 64 tokens, head dimensions that are a multiple of 16 up to 256."""

    def __init__(self, device: torch.device) -> None:
        self.library = load_flashinfer()
        # The kernels' counters begin at zero and are left at zero by each launch.
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan_decode(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Fetch the rows' pages and lengths."""
        there = to_device(rows, kv.page_size)
        return _Decode(self.library, self.workspace, there.page_table, there.kv_lens, kv, there.max_kv_len)

    def plan_prefill(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Fetch the chunks' pages and lengths. On Blackwell only."""
        return _Prefill(self.library, self.workspace, to_device(rows, kv.page_size), kv)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        """Decode whose launch depends on the batch and the width of the page table."""
        return StaticDecode(_Decode(self.library, self.workspace, page_table, kv_lens, kv, max_seq_len))


@dataclass(frozen=True)
class _Decode:
    library: ModuleType
    workspace: Tensor
    page_table: Tensor
    kv_lens: Tensor
    kv: KVCache
    max_kv_len: int

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        out: Tensor = self.library.decode.trtllm_batch_decode_with_kv_cache(
            q.contiguous(),
            (self.kv.k[layer], self.kv.v[layer]),
            self.workspace,
            self.page_table,
            self.kv_lens,
            self.max_kv_len,
            bmm1_scale=q.shape[-1] ** -0.5,
            bmm2_scale=1.0,
            window_left=window - 1 if window else -1,
            kv_layout="NHD",
        )
        return out


@dataclass(frozen=True)
class _Prefill:
    library: ModuleType
    workspace: Tensor
    rows: DeviceRows
    kv: KVCache

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows = self.rows
        ends = torch.cumsum(rows.kv_lens, 0, dtype=torch.int32)
        out: Tensor = self.library.prefill.trtllm_batch_context_with_kv_cache(
            q.contiguous(),
            (self.kv.k[layer], self.kv.v[layer]),
            self.workspace,
            rows.page_table,
            rows.kv_lens,
            rows.max_query_len,
            rows.max_kv_len,
            bmm1_scale=q.shape[-1] ** -0.5,
            bmm2_scale=1.0,
            batch_size=len(rows.kv_lens),
            cum_seq_lens_q=rows.cu_query_lens,
            cum_seq_lens_kv=torch.nn.functional.pad(ends, (1, 0)),
            window_left=window - 1 if window else -1,
            kv_layout="NHD",
        )
        return out
