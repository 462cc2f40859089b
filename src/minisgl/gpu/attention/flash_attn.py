"""The backend called `fa`: FlashAttention 3 (Shah et al., arXiv 2407.08608), or its 4th or 2nd version.

What the card can run and what is installed decide. Only the 3rd version could be tested.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from minisgl.core.attention import DeviceRows, GraphDecode, PlannedAttention, Rows, StaticDecode, to_device
from minisgl.core.kv_cache import KVCache
from minisgl.errors import ConfigError

ONE_SPLIT_PAIRS = 256
"""From this many pairs of decode row and KV head on, they fill the card: splitting a row's keys only adds a merge."""
FA2_PAGE = 256
"""FlashAttention 2 takes pages that are a multiple of this."""


class FlashAttention:
    """float16 and bfloat16, head dimensions up to 256, any page size (version 2: multiples of 256)."""

    def __init__(self, version: int, page_size: int) -> None:
        """`version` is what `installed_version` found. Raises ConfigError for what that version cannot do."""
        names = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
        try:
            self.module: ModuleType = importlib.import_module(names[version])
        except (ImportError, OSError) as error:
            raise ConfigError(f"the attention backend fa cannot load {names[version]}: {error}") from error
        if version == 2 and page_size % FA2_PAGE:
            raise ConfigError(f"FlashAttention 2 needs a --page-size that is a multiple of {FA2_PAGE}, not {page_size}")
        self.version = version

    def plan_decode(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Fetch the rows' pages and lengths."""
        return self._step(to_device(rows, kv.page_size), kv, decode=True)

    def plan_prefill(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Fetch the chunks' pages and lengths."""
        return self._step(to_device(rows, kv.page_size), kv, decode=False)

    def graph_decode(self, page_table: Tensor, kv_lens: Tensor, kv: KVCache, max_seq_len: int) -> GraphDecode:
        """Decode whose launch depends on the batch and the width of the page table."""
        starts = torch.arange(len(kv_lens) + 1, dtype=torch.int32, device=kv_lens.device)
        return StaticDecode(self._step(DeviceRows(page_table, kv_lens, starts, 1, max_seq_len), kv, decode=True))

    def _step(self, rows: DeviceRows, kv: KVCache, *, decode: bool) -> PlannedAttention:
        if self.version == 3:
            return _Step3(self.module, rows, kv, decode)
        return (_Step4 if self.version == 4 else _Step2)(self.module, rows, kv, decode)


@dataclass(frozen=True)
class _Step3:
    """A step through `flash_attn_interface`; its first layer lays out the work for all."""

    module: ModuleType
    rows: DeviceRows
    kv: KVCache
    decode: bool
    layouts: dict[int, Tensor] = field(default_factory=dict)  # by window: what goes to which multiprocessor

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        if layer == 0:
            self.layouts.clear()  # a captured step lays out anew in every replay, from the lengths of the moment
        if window not in self.layouts:
            self.layouts[window] = self._lay_out(q, window)
        rows = self.rows
        out: Tensor = self.module.flash_attn_with_kvcache(
            q.unsqueeze(1) if self.decode else q,
            self.kv.k[layer],
            self.kv.v[layer],
            cache_seqlens=rows.kv_lens,
            page_table=rows.page_table,
            cu_seqlens_q=None if self.decode else rows.cu_query_lens,
            max_seqlen_q=None if self.decode else rows.max_query_len,
            causal=True,
            window_size=_window(window),
            num_splits=self._splits(),
            scheduler_metadata=self.layouts[window],
        )
        return out.squeeze(1) if self.decode else out

    def _splits(self) -> int:
        # 0: the library's choice
        return 1 if self.decode and len(self.rows.kv_lens) * self.kv.k.shape[3] >= ONE_SPLIT_PAIRS else 0

    def _lay_out(self, q: Tensor, window: int) -> Tensor:
        rows, (page_size, kv_heads) = self.rows, self.kv.k.shape[2:4]
        layout: Tensor = self.module.get_scheduler_metadata(
            len(rows.kv_lens),
            rows.max_query_len,
            rows.page_table.shape[1] * page_size,
            q.shape[1],
            kv_heads,
            q.shape[2],
            rows.kv_lens,
            qkv_dtype=q.dtype,
            cu_seqlens_q=None if self.decode else rows.cu_query_lens,
            page_size=page_size,
            causal=True,
            window_size=_window(window),
            num_splits=self._splits(),
        )
        return layout


@dataclass(frozen=True)
class _Step4:
    """A step through `flash_attn.cute`."""

    module: ModuleType
    rows: DeviceRows
    kv: KVCache
    decode: bool

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        out = self.module.flash_attn_varlen_func(
            q,
            self.kv.k[layer],
            self.kv.v[layer],
            cu_seqlens_q=self.rows.cu_query_lens,
            max_seqlen_q=self.rows.max_query_len,
            seqused_k=self.rows.kv_lens,
            page_table=self.rows.page_table,
            causal=True,
            window_size=(window - 1, 0) if window else (None, None),
        )
        answer: Tensor = out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp as well
        return answer


@dataclass(frozen=True)
class _Step2:
    """A step through `flash_attn`."""

    module: ModuleType
    rows: DeviceRows
    kv: KVCache
    decode: bool

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        rows, k, v = self.rows, self.kv.k[layer], self.kv.v[layer]
        if self.decode:
            out: Tensor = self.module.flash_attn_with_kvcache(
                q.unsqueeze(1),
                k,
                v,
                cache_seqlens=rows.kv_lens,
                block_table=rows.page_table,
                causal=True,
                window_size=_window(window),
            )
            return out.squeeze(1)
        ends = torch.cumsum(rows.kv_lens, 0, dtype=torch.int32)
        prefill: Tensor = self.module.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=rows.cu_query_lens,
            cu_seqlens_k=torch.nn.functional.pad(ends, (1, 0)),
            max_seqlen_q=rows.max_query_len,
            max_seqlen_k=rows.max_kv_len,
            causal=True,
            window_size=_window(window),
            block_table=rows.page_table,
        )
        return prefill


def _window(window: int) -> tuple[int, int]:
    """Tokens to the left and to the right that a token sees beside itself; -1 is all."""
    return (window - 1, 0) if window else (-1, -1)
