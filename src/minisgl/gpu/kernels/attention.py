"""Attention over paged keys and values: online softmax, prefill, and a page table for FlashInfer.

FlashAttention's online softmax (Dao et al., arXiv 2205.14135). The query heads that share a KV head share its loads:
they fill the rows of one matmul. Accumulation is in float32. Decode is in `decode.py`. Twin: `core.attention`'s
`TorchAttention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.attention import PlannedAttention
from minisgl.core.kv_cache import KVCache
from minisgl.gpu.kernels.jit import after_previous, jit, jit_varying, launch_options, next_power_of_2, warps_for

NO_WINDOW = 1 << 30
MIN_DOT = 16  # the fewest rows that a matmul on tensor cores takes
SEARCH = tl.constexpr(128)  # rows that a prefill thread block looks at together to find its own


@jit
def key_value(
    k: tensor, v: tensor, table: tensor, start: tensor, tokens: tensor, seen: tensor, base: tensor, dims: tensor,
    PAGE: constexpr, TOKEN: constexpr, HEAD_DIM: constexpr, TILE: constexpr,
) -> Any:  # fmt: skip
    # k[token, dims] as (dims, TILE) and v as (TILE, dims) of one KV head. TOKEN: elements of a token in the cache.
    if PAGE % TILE == 0:  # `start` is a multiple of TILE: one page holds the tile
        page = tl.load(table + start // PAGE).to(tl.int64)
        offsets = page * (PAGE * TOKEN) + base + (start % PAGE + tokens - start) * TOKEN
    else:
        page = tl.load(table + tokens // PAGE, mask=seen, other=0).to(tl.int64)
        offsets = page * (PAGE * TOKEN) + base + (tokens % PAGE) * TOKEN
    inside = dims < HEAD_DIM
    key = tl.load(k + offsets[None, :] + dims[:, None], mask=seen[None, :] & inside[:, None], other=0.0)
    value = tl.load(v + offsets[:, None] + dims[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
    return key, value


@jit
def softmax_weights(scores: tensor, visible: tensor, scale: tensor, best: tensor, total: tensor) -> Any:
    # One tile of the online softmax in base 2; `scale` holds log2(e). visible broadcasts to (queries, TILE).
    scores = tl.where(visible, scores * scale, float("-inf"))
    peak = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(peak == float("-inf"), 0.0, peak)  # a query that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    return weights, shrink[:, None], peak, total * shrink + tl.sum(weights, 1)


@jit
def online_softmax(
    query: tensor, key: tensor, value: tensor, visible: tensor, scale: tensor, acc: tensor, best: tensor, total: tensor
) -> Any:
    scores = tl.dot(query, key.to(query.dtype), input_precision="ieee")
    weights, shrink, best, total = softmax_weights(scores, visible, scale, best, total)
    acc = acc * shrink + tl.dot(weights.to(query.dtype), value.to(query.dtype), input_precision="ieee")
    return acc, best, total


@jit_varying("rows", "starts", "lens", "table_stride")
def _prefill_kernel(
    q: tensor, k: tensor, v: tensor, table: tensor, starts: tensor, lens: tensor, out: tensor, rows: tensor,
    q_stride: tensor, table_stride: tensor, window: tensor, scale: tensor, HEADS: constexpr, GROUP: constexpr,
    HEAD_DIM: constexpr, PAGE: constexpr, M: constexpr, D: constexpr, TILE: constexpr,
) -> None:  # fmt: skip
    # A thread block holds QUERIES tokens of one row for the GROUP heads of one KV head. The blocks of row r begin at
    # number starts[r] // QUERIES + r; rounding may leave an empty block between two rows.
    QUERIES: tl.constexpr = M // GROUP
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # late blocks see the most tokens: start them first
    row = -1
    for low in range(0, rows, SEARCH):
        candidate = low + tl.arange(0, SEARCH)
        begin = tl.load(starts + candidate, mask=candidate < rows, other=1 << 30)
        row += tl.sum((begin // QUERIES + candidate <= block).to(tl.int32), 0)
    begin = tl.load(starts + row)
    count = tl.load(starts + row + 1) - begin
    first = (block - begin // QUERIES - row) * QUERIES
    if first >= count:
        return
    length = tl.load(lens + row)
    member, dims = tl.arange(0, M), tl.arange(0, D)
    token = first + member // GROUP
    heads = head * GROUP + member % GROUP
    mask = ((member < QUERIES * GROUP) & (token < count))[:, None] & (dims < HEAD_DIM)[None, :]
    place = (begin + token).to(tl.int64)
    query = tl.load(q + place[:, None] * q_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    position = length - count + token
    newest = length - count + first
    line = table + row * table_stride
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    oldest = tl.maximum(newest - window + 1, 0) // TILE * TILE
    middle = tl.maximum((newest + 1) // TILE * TILE, oldest)  # below it no token is newer than any query
    for start in range(oldest, middle, TILE):
        tokens = start + tl.arange(0, TILE)
        key, value = key_value(
            k, v, line, start, tokens, tokens >= 0, head * HEAD_DIM, dims, PAGE, HEADS * HEAD_DIM, HEAD_DIM, TILE
        )
        visible = tokens[None, :] > position[:, None] - window
        acc, best, total = online_softmax(query, key, value, visible, scale, acc, best, total)
    for start in range(middle, tl.minimum(newest + QUERIES, length), TILE):
        tokens = start + tl.arange(0, TILE)
        key, value = key_value(
            k, v, line, start, tokens, tokens < length, head * HEAD_DIM, dims, PAGE, HEADS * HEAD_DIM, HEAD_DIM, TILE
        )
        visible = (tokens[None, :] <= position[:, None]) & (tokens[None, :] > position[:, None] - window)
        acc, best, total = online_softmax(query, key, value, visible, scale, acc, best, total)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    lines = place * (HEADS * GROUP) + heads
    tl.store(out + lines[:, None] * HEAD_DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class PrefillAttention(PlannedAttention):
    """Causal attention of ragged chunks, each at the end of its row's cached tokens.

    page_table int32 (rows, max_pages); cu_query_lens int32 (rows + 1,); kv_lens int32 (rows,), the chunks included.
    """

    page_table: Tensor
    cu_query_lens: Tensor
    kv_lens: Tensor
    kv: KVCache

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        """q (T, H, hd) -> (T, H, hd); window 0 is none."""
        k, v = self.kv.k[layer], self.kv.v[layer]
        (total, query_heads, head_dim), (page_size, kv_heads) = q.shape, k.shape[1:3]
        rows, group = len(self.kv_lens), query_heads // kv_heads
        assert q.stride()[1:] == (head_dim, 1)
        assert all(x.is_contiguous() for x in (k, v))
        dims = next_power_of_2(head_dim)
        # float32 has no fast matmul and twice the bytes.
        small = q.dtype == torch.float32 or dims > 128
        block = max(32 if small else 64, next_power_of_2(group))
        out = torch.empty((total, query_heads, head_dim), dtype=q.dtype, device=q.device)
        _prefill_kernel[(kv_heads, total // (block // group) + rows)](
            q, k, v, self.page_table, self.cu_query_lens, self.kv_lens, out, rows, q.stride(0),
            self.page_table.stride(0), window or NO_WINDOW, math.log2(math.e) * head_dim**-0.5, HEADS=kv_heads,
            GROUP=group, HEAD_DIM=head_dim, PAGE=page_size, M=block, D=dims, TILE=32 if small else 64, num_warps=4,
            num_stages=2 if small else 3,
        )  # fmt: skip
        return out


@jit
def _merge_kernel(
    ones: tensor, out: tensor, starts: tensor, rows: tensor, last: tensor, width: tensor,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0)
    place = row.to(tl.int64) * width + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < width
    if (row < rows) & (row < tl.load(starts)):
        tl.store(out + place, tl.load(ones + place, mask=mask, other=0.0), mask=mask)
    elif row >= tl.load(starts + last):
        tl.store(out + place, tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty), mask=mask)


def merge_rows(ones: Tensor, out: Tensor, starts: Tensor) -> None:
    """Put decode rows before chunks: into out (T, H, hd) those of ones (R, H, hd) up to the first chunk's start.

    starts int32 (C + 1,): where each chunk's tokens begin, and the end of the last. Behind it `out` becomes 0: what
    lies there was never written, and a NaN would choose experts that do not exist.
    """
    rows, width = len(ones), out[0].numel()
    block = next_power_of_2(width)
    _merge_kernel[(len(out),)](
        ones, out, starts, rows, len(starts) - 1, width, BLOCK=block, num_warps=warps_for(block), **launch_options()
    )


@jit_varying("rows", "lens", "table_stride")
def _flatten_kernel(
    table: tensor, lens: tensor, starts: tensor, pages: tensor, filled: tensor, rows: tensor, table_stride: tensor,
    PAGE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    start = 0
    for low in range(0, row, BLOCK):
        earlier = low + tl.arange(0, BLOCK)
        length = tl.load(lens + earlier, mask=earlier < row, other=0)
        start += tl.sum((length + PAGE - 1) // PAGE, 0)
    length = tl.load(lens + row)
    count = (length + PAGE - 1) // PAGE
    tl.store(starts + row, start)
    tl.store(filled + row, length - (count - 1) * PAGE)
    if row == rows - 1:
        tl.store(starts + rows, start + count)
    for low in range(0, count, BLOCK):
        index = low + tl.arange(0, BLOCK)
        page = tl.load(table + row.to(tl.int64) * table_stride + index, mask=index < count, other=0)
        tl.store(pages + start + index, page, mask=index < count)


def flatten_pages(
    page_table: Tensor, kv_lens: Tensor, page_size: int, starts: Tensor, pages: Tensor, filled: Tensor
) -> None:
    """Write a page table as compressed sparse rows: `pages[starts[r] : starts[r + 1]]` are the pages of row r.

    page_table int32 (B, max_pages), kv_lens int32 (B,) at least 1; out, all int32: starts (B + 1,), pages (at least as
    many as are in use,), filled (B,), the tokens in each row's last page.
    """
    rows = len(kv_lens)
    _flatten_kernel[(rows,)](
        page_table, kv_lens, starts, pages, filled, rows, page_table.stride(0), PAGE=page_size, BLOCK=256, num_warps=4
    )
