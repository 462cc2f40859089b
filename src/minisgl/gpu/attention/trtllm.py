"""The backend called `trtllm`: TensorRT-LLM's attention through FlashInfer, XQA on Hopper and trtllm-gen on Blackwell.

trtllm-gen's prefill exists on Blackwell only; elsewhere `select.py` takes FlashInfer's own kernels for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from minisgl.core.attention import PlannedAttention, SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.gpu.attention.flashinfer import load_flashinfer
from minisgl.gpu.attention.interface import DeviceBatch, GraphDecode, StaticDecode, to_device

WORKSPACE_BYTES = 128 * 2**20


class TensorRTLLM:
    """float16 and bfloat16, pages of 16, 32 or 64 tokens, head dimensions that are a multiple of 16 up to 256."""

    def __init__(self, device: torch.device) -> None:
        self.library = load_flashinfer()
        # The kernels' counters start at zero, and each launch leaves them at zero.
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan_decode(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        on_device = to_device(rows, kv.page_size)
        return TensorRTLLMDecode(
            self.library, self.workspace, on_device.page_table, on_device.kv_lens, kv, on_device.max_kv_len
        )

    def plan_prefill(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return TensorRTLLMPrefill(self.library, self.workspace, to_device(rows, kv.page_size), kv)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        return StaticDecode(TensorRTLLMDecode(self.library, self.workspace, page_table, kv_lens, kv, max_seq_len))


@dataclass(frozen=True)
class TensorRTLLMDecode:
    library: ModuleType
    workspace: Tensor
    page_table: Tensor
    kv_lens: Tensor
    kv: KVCache
    max_kv_len: int

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        out: Tensor = self.library.decode.trtllm_batch_decode_with_kv_cache(
            q.contiguous(), (self.kv.k[layer], self.kv.v[layer]), self.workspace, self.page_table, self.kv_lens,
            self.max_kv_len, bmm1_scale=q.shape[-1] ** -0.5, bmm2_scale=1.0,
            window_left=window - 1 if window else -1, kv_layout="NHD",
        )  # fmt: skip
        return out


@dataclass(frozen=True)
class TensorRTLLMPrefill:
    library: ModuleType
    workspace: Tensor
    rows: DeviceBatch
    kv: KVCache

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows = self.rows
        ends = torch.cumsum(rows.kv_lens, 0, dtype=torch.int32)
        out: Tensor = self.library.prefill.trtllm_batch_context_with_kv_cache(
            q.contiguous(), (self.kv.k[layer], self.kv.v[layer]), self.workspace, rows.page_table, rows.kv_lens,
            rows.max_query_len, rows.max_kv_len, bmm1_scale=q.shape[-1] ** -0.5, bmm2_scale=1.0,
            batch_size=len(rows.kv_lens), cum_seq_lens_q=rows.cu_query_lens,
            cum_seq_lens_kv=torch.nn.functional.pad(ends, (1, 0)),
            window_left=window - 1 if window else -1, kv_layout="NHD",
        )  # fmt: skip
        return out
