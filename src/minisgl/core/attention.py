"""Attention over the paged cache: what a step asks for, what a backend is, and the backend in plain torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minisgl.core.kv_cache import KVCache
from minisgl.core.ops import RopeStore
from minisgl.core.plan import Int32

# Of pages gathered for decode rows together. On a CPU a block still lies in its caches when it is read again: 64 rows
# of 512 tokens take 148 ms in blocks of 8 rows, 232 in one (SmolLM2-135M's 30 layers, two cores).
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
QUERY_BLOCK = 512  # queries of a chunk handled together, so that the mask of a long prompt stays small


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Some rows of a step, each a sequence with `query_lens` new tokens at the end of `kv_lens` in the cache.

    Queries lie row after row: T = sum(query_lens).
    """

    page_table: Tensor  # int32 (rows, pages) on the device; past a row's last page are any valid pages
    query_lens: Int32  # (rows,) on the host
    kv_lens: Int32  # (rows,) on the host, the new tokens included
    cu_query_lens: Tensor  # int32 (rows + 1,) on the device: where each row's queries begin, and T
    kv_lens_device: Tensor  # int32 (rows,): kv_lens on the device


class PlannedAttention(ABC):
    """Attention of one step, prepared once, to be run in every layer."""

    def begin(self, windows: Sequence[int]) -> None:  # noqa: B027
        """Prepare a step whose layers have these windows, before anything else of it; most need nothing."""

    @abstractmethod
    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        """Causal attention of q (T, H, hd) over each row's cached keys and values -> (T, H, hd).

        Query head h reads KV head h // (H / K); scores are scaled by hd ** -0.5. With a window w > 0 a token sees
        itself and the w - 1 before it. The new tokens' keys and values are in the cache already.
        """

    def run_qkv(self, qkv: Tensor, rope: RopeStore, layer: int, window: int) -> Tensor:
        """The same of qkv (T, (H + 2K) * hd), whose keys and values are written first; a kernel may do all in one."""
        return self.run(rope(qkv), layer, window)


class AttentionBackend(Protocol):
    """A way to compute attention, of decode rows with one query each, of prefill chunks, or of both."""

    def plan(self, rows: SequenceBatch, kv: KVCache, decode: bool) -> PlannedAttention: ...


@dataclass
class Attention:
    prefill: AttentionBackend
    decode: AttentionBackend

    def plan(self, decode: SequenceBatch, prefill: SequenceBatch, kv: KVCache) -> PlannedAttention:
        """Prepare a step, which has rows of at least one kind; the queries of decode rows come first."""
        if not len(prefill.kv_lens):
            return self.decode.plan(decode, kv, decode=True)
        if not len(decode.kv_lens):
            return self.prefill.plan(prefill, kv, decode=False)
        parts = self.decode.plan(decode, kv, decode=True), self.prefill.plan(prefill, kv, decode=False)
        return _MixedStep(len(decode.kv_lens), *parts)


@dataclass(frozen=True)
class _MixedStep(PlannedAttention):
    decodes: int
    decode: PlannedAttention
    prefill: PlannedAttention

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        decodes = self.decode.run(q[: self.decodes], layer, window)
        return torch.cat([decodes, self.prefill.run(q[self.decodes :], layer, window)])


class TorchAttention:
    """The backend `torch`, every kernel's reference: gathers pages for `scaled_dot_product_attention`."""

    def plan(self, rows: SequenceBatch, kv: KVCache, decode: bool) -> PlannedAttention:
        return _TorchStep(rows, kv, decode)


@dataclass(frozen=True)
class _Block:
    """Queries that are attended together: one of each of g rows, or some of one row."""

    queries: slice | Tensor  # of the step's
    pages: Tensor  # int32 (g * n,) page ids, n of each row
    tokens: int  # on a row's pages, up to the last that is seen
    mask: Tensor | None  # bool (g, 1, 1, tokens) or (queries, tokens): what is seen; None: causal from token 0


class _TorchStep(PlannedAttention):
    def __init__(self, rows: SequenceBatch, kv: KVCache, decode: bool) -> None:
        self.rows, self.kv = rows, kv
        self.split, self.attend = (split_rows, attend_rows) if decode else (split_chunks, attend_chunk)
        self.blocks: dict[int, list[_Block]] = {}  # by window

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        if window not in self.blocks:
            self.blocks[window] = self.split(self.rows, self.kv, window)
        blocks = self.blocks[window]
        if len(blocks) == 1:
            return self.attend(q, self.kv, layer, blocks[0])
        out = torch.empty_like(q)
        for block in blocks:
            out[block.queries] = self.attend(q[block.queries], self.kv, layer, block)
        return out


def gather(kv: KVCache, layer: int, pages: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A layer's keys and values on the pages of some rows, as many of each: (rows, K, tokens, hd) in `dtype`."""
    k, v = kv.k[layer], kv.v[layer]
    if k.dtype == dtype:
        k, v = k.index_select(0, pages), v.index_select(0, pages)
    else:  # as bytes, as torch does not index FP8
        k, v = (x.view(torch.uint8).index_select(0, pages).view(x.dtype).to(dtype) for x in (k, v))
    shape = rows, -1, *k.shape[2:]
    return k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)


def attend_rows(q: Tensor, kv: KVCache, layer: int, block: _Block) -> Tensor:
    """Attention of decode rows' queries (g, H, hd) -> (g, H, hd)."""
    k, v = gather(kv, layer, block.pages, len(q), q.dtype)
    # The queries that share a KV head take the place of a query's length, so that k and v are never repeated.
    grouped = q.view(len(q), k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, block.mask).reshape(q.shape)


def split_rows(rows: SequenceBatch, kv: KVCache, window: int) -> list[_Block]:
    lens, table, device, page_size = rows.kv_lens, rows.page_table, kv.k.device, kv.page_size
    first_token = np.maximum(lens - window, 0) if window else np.zeros_like(lens)
    first_page = first_token // page_size
    num_pages = -(-lens // page_size) - first_page
    page_bytes = kv.k[0, 0].numel() * kv.k.element_size()
    blocks = []
    for order in split_by_length(num_pages, max(1, BLOCK_BYTES[device.type] // page_bytes)):
        first, count = first_page[order, None], int(num_pages[order].max())
        columns = np.minimum(first + np.arange(count), table.shape[1] - 1)
        flat = order[:, None] * table.shape[1] + columns  # (g, n)
        pages = table.reshape(-1).index_select(0, torch.from_numpy(flat.reshape(-1)).to(device))
        tokens = first * page_size + np.arange(count * page_size)  # (g, n * page_size)
        seen = (tokens >= first_token[order, None]) & (tokens < lens[order, None])
        mask = torch.from_numpy(seen[:, None, None]).to(device)
        blocks.append(_Block(torch.from_numpy(order).to(device), pages, count * page_size, mask))
    return blocks


def split_by_length(lens: Int32, limit: int) -> list[NDArray[np.int64]]:
    """Rows in groups: of one row, or at most `limit` long in all when each row is padded to its group's longest."""
    if len(lens) * int(lens.max()) <= limit:
        return [np.arange(len(lens))]
    groups, rest = [], np.argsort(-lens, kind="stable")
    while len(rest):
        size = max(1, limit // int(lens[rest[0]]))
        groups.append(rest[:size])
        rest = rest[size:]
    return groups


def attend_chunk(q: Tensor, kv: KVCache, layer: int, block: _Block) -> Tensor:
    """Attention of queries of one row's chunk (n, H, hd) -> (n, H, hd)."""
    k, v = (x[:, :, : block.tokens] for x in gather(kv, layer, block.pages, 1, q.dtype))
    queries, mask = q.transpose(0, 1).unsqueeze(0), block.mask
    heads = F.scaled_dot_product_attention(queries, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return heads[0].transpose(0, 1)


def split_chunks(rows: SequenceBatch, kv: KVCache, window: int) -> list[_Block]:
    first, blocks = 0, []
    for row, (length, kv_len) in enumerate(zip(rows.query_lens.tolist(), rows.kv_lens.tolist(), strict=True)):
        for start in range(kv_len - length, kv_len, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, kv_len)
            page = max(0, start - window + 1) // kv.page_size if window else 0
            pages, low, mask = rows.page_table[row, page : -(-end // kv.page_size)], page * kv.page_size, None
            if start > 0 or 0 < window < end:
                query = torch.arange(start, end, device=kv.k.device)[:, None]
                token = torch.arange(low, end, device=kv.k.device)
                mask = token <= query
                if window:
                    mask &= token > query - window
            blocks.append(_Block(slice(first, first + end - start), pages, end - low, mask))
            first += end - start
    return blocks
