"""The backend called `trtllm`: TensorRT-LLM's attention through FlashInfer, XQA on Hopper and trtllm-gen on Blackwell.

trtllm-gen's prefill exists on Blackwell only; on other GPUs `select.py` takes FlashInfer's own kernels for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

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
        return TensorRTLLMStep(self.library, self.workspace, to_device(rows, kv.page_size), kv, decode=True)

    def plan_prefill(self, rows: SequenceBatch, kv: KVCache) -> PlannedAttention:
        return TensorRTLLMStep(self.library, self.workspace, to_device(rows, kv.page_size), kv, decode=False)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        starts = torch.empty(0, dtype=torch.int32, device=kv_lens.device)  # only prefill reads them
        rows = DeviceBatch(page_table, kv_lens, starts, 1, max_seq_len)
        return StaticDecode(TensorRTLLMStep(self.library, self.workspace, rows, kv, decode=True))


@dataclass(frozen=True)
class TensorRTLLMStep:
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
