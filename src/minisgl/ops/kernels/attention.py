"""Attention over paged keys and values: split decode, prefill, and a page table flattened for FlashInfer.

FlashAttention's online softmax (Dao et al., arXiv 2205.14135), for decode with the keys of a row split among programs
(Flash-Decoding, Dao et al., 2023). The query heads that share a KV head share its loads: they fill the rows of one
matrix product. Accumulation is in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.ops.kernels.jit import jit, launch_options
from minisgl.ops.kernels.pdl import after_previous

MIN_DOT = 16
"""Rows that a matrix product on tensor cores takes at least."""
DECODE_TILE = 64
"""Cached tokens a decode program reads together."""
MERGED = tl.constexpr(32)
"""Parts of a split row that are merged together."""
SEARCH = tl.constexpr(128)
"""Rows looked at together when a prefill program finds its own."""


@jit
def _key_value(
    k: tl.tensor, v: tl.tensor, table: tl.tensor, start: tl.tensor,
    tokens: tl.tensor, seen: tl.tensor, base: tl.tensor, dims: tl.tensor,
    PAGE: tl.constexpr, TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
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
def _online(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    visible: tl.tensor,
    scale: tl.tensor,
    acc: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
) -> Any:
    # One tile of the online softmax in base 2; `scale` holds log2(e). visible broadcasts to (queries, TILE).
    scores = tl.dot(query, key, input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    peak = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(peak == float("-inf"), 0.0, peak)  # a query that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    acc = acc * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return acc, peak, total * shrink + tl.sum(weights, 1)


@jit
def _decode_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, table: tl.tensor,
    lens: tl.tensor, out: tl.tensor, partial: tl.tensor, sums: tl.tensor,
    q_stride: tl.tensor, table_stride: tl.tensor, window: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lens + row)
    oldest = length - window  # negative without a window
    first = tl.maximum(oldest, 0) // TILE * TILE
    span = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    low = first + split * span
    high = tl.minimum(low + span, length)
    if low >= high:
        return
    member, dims = tl.arange(0, M), tl.arange(0, D)
    heads = head * GROUP + member
    mine = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(q + row * q_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=mine, other=0.0)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    line = table + row * table_stride
    for start in range(low, high, TILE):
        tokens = start + tl.arange(0, TILE)
        seen = (tokens < high) & (tokens >= oldest)
        key, value = _key_value(
            k, v, line, start, tokens, seen, head * HEAD_DIM, dims, PAGE, HEADS * HEAD_DIM, HEAD_DIM, TILE
        )
        acc, best, total = _online(query, key, value, seen[None, :], scale, acc, best, total)
    acc = acc / total[:, None]
    place = row * (HEADS * GROUP) + heads
    if SPLITS == 1:
        tl.store(out + place[:, None] * HEAD_DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=mine)
    else:
        place = place * SPLITS + split
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=mine)
        tl.store(sums + place, best + tl.log2(total), mask=member < GROUP)


@jit
def _merge_kernel(
    partial: tl.tensor, sums: tl.tensor, lens: tl.tensor, out: tl.tensor, window: tl.tensor,
    QUERY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    line = tl.program_id(0).to(tl.int64)
    length = tl.load(lens + line // QUERY_HEADS)
    first = tl.maximum(length - window, 0) // TILE * TILE
    span = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    live = tl.cdiv(length - first, span)
    split, dims = tl.arange(0, SPLITS), tl.arange(0, D)
    top = tl.max(tl.load(sums + line * SPLITS + split, mask=split < live, other=float("-inf")), 0)
    acc = tl.zeros([D], tl.float32)
    total = tl.zeros([1], tl.float32)
    for low in range(0, live, MERGED):
        part = low + tl.arange(0, MERGED)
        place = line * SPLITS + part
        weight = tl.exp2(tl.load(sums + place, mask=part < live, other=float("-inf")) - top)
        inside = (part < live)[:, None] & (dims < HEAD_DIM)[None, :]
        parts = tl.load(partial + place[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        acc += tl.sum(parts * weight[:, None], 0)
        total += tl.sum(weight, 0)
    tl.store(out + line * HEAD_DIM + dims, (acc / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_splits(rows: int, kv_heads: int, max_kv_len: int, processors: int) -> int:
    """Parts to cut each row's keys into, a power of two.

    Enough for 4 programs a processor, each with a tile at least; merging more than 32 parts costs more than it gains
    unless most processors would stay idle.
    """
    pairs = rows * kv_heads
    wanted = max(1, 4 * processors // pairs)
    limit = 64 if 32 * pairs <= processors else 32
    longest = triton.next_power_of_2(triton.cdiv(max_kv_len, DECODE_TILE))
    return int(min(limit, 1 << (wanted.bit_length() - 1), longest))


class Cut(NamedTuple):
    """How a decode program works: cached tokens it reads together, its warps, and loads in flight."""

    tile: int
    warps: int
    stages: int


def decode_cut(pairs: int, group: int, splits: int) -> Cut:
    """What reads the cache fastest for so many pairs of row and KV head, measured on an H200 with pages of 16.

    Many pairs fill the card with small programs; few need more in flight each. `group` query heads share a KV head.
    """
    if splits > 1 or pairs < 256:
        return Cut(DECODE_TILE, 4, 2)
    if pairs < 768:
        return Cut(2 * DECODE_TILE, 4, 2)
    return Cut(DECODE_TILE // 2, 2, 2) if pairs >= 1400 and group <= 2 else Cut(DECODE_TILE, 2, 3)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, page_table: Tensor, kv_lens: Tensor, *, window: int, splits: int
) -> Tensor:
    """Attention of one query a row: q (B, H, hd) -> (B, H, hd).

    k, v (pages, page_size, K, hd) of one layer; page_table int32 (B, max_pages), kv_lens int32 (B,) at least 1;
    window 0 is none. `splits` is a power of two, the number of programs that share a row; it alone with the shapes
    fixes the launch.
    """
    rows, query_heads, head_dim = q.shape
    page_size, kv_heads = k.shape[1:3]
    group = query_heads // kv_heads
    assert q.stride()[1:] == (head_dim, 1)
    assert k.is_contiguous()
    assert v.is_contiguous()
    out = torch.empty((rows, query_heads, head_dim), dtype=q.dtype, device=q.device)
    partial, sums = out, out
    if splits > 1:
        partial = torch.empty((rows, query_heads, splits, head_dim), dtype=torch.float32, device=q.device)
        sums = torch.empty((rows, query_heads, splits), dtype=torch.float32, device=q.device)
    cut = decode_cut(rows * kv_heads, group, splits)
    dims, pdl = triton.next_power_of_2(head_dim), launch_options()
    reach = window or 1 << 30
    _decode_kernel[(kv_heads, splits, rows)](
        q, k, v, page_table, kv_lens, out, partial, sums,
        q.stride(0), page_table.stride(0), reach, math.log2(math.e) * head_dim**-0.5,
        HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=page_size, SPLITS=splits,
        M=max(MIN_DOT, triton.next_power_of_2(group)), D=dims, TILE=cut.tile,
        PDL=bool(pdl), num_warps=cut.warps, num_stages=cut.stages, **pdl,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(rows * query_heads,)](
            partial, sums, kv_lens, out, reach,
            QUERY_HEADS=query_heads, HEAD_DIM=head_dim, SPLITS=splits, D=dims, TILE=cut.tile,
            PDL=bool(pdl), num_warps=4, **pdl,
        )  # fmt: skip
    return out


@jit
def _prefill_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, table: tl.tensor, starts: tl.tensor, lens: tl.tensor, out: tl.tensor,
    rows: tl.tensor, q_stride: tl.tensor, table_stride: tl.tensor, window: tl.tensor, scale: tl.tensor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    # A program holds QUERIES tokens of one row for the GROUP heads of one KV head. Row r owns blocks from number
    # starts[r] // QUERIES + r on; what rounding leaves over between two rows is an empty block.
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
    mine = ((member < QUERIES * GROUP) & (token < count))[:, None] & (dims < HEAD_DIM)[None, :]
    place = (begin + token).to(tl.int64)
    query = tl.load(q + place[:, None] * q_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=mine, other=0.0)
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
        key, value = _key_value(
            k, v, line, start, tokens, tokens >= 0, head * HEAD_DIM, dims, PAGE, HEADS * HEAD_DIM, HEAD_DIM, TILE
        )
        visible = tokens[None, :] > position[:, None] - window
        acc, best, total = _online(query, key, value, visible, scale, acc, best, total)
    for start in range(middle, tl.minimum(newest + QUERIES, length), TILE):
        tokens = start + tl.arange(0, TILE)
        key, value = _key_value(
            k, v, line, start, tokens, tokens < length, head * HEAD_DIM, dims, PAGE, HEADS * HEAD_DIM, HEAD_DIM, TILE
        )
        visible = (tokens[None, :] <= position[:, None]) & (tokens[None, :] > position[:, None] - window)
        acc, best, total = _online(query, key, value, visible, scale, acc, best, total)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    lines = place * (HEADS * GROUP) + heads
    tl.store(out + lines[:, None] * HEAD_DIM + dims[None, :], acc.to(out.dtype.element_ty), mask=mine)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, page_table: Tensor, cu_query_lens: Tensor, kv_lens: Tensor, *, window: int
) -> Tensor:
    """Causal attention of ragged chunks, each at the end of its row's cached tokens: q (T, H, hd) -> (T, H, hd).

    k, v (pages, page_size, K, hd) of one layer; page_table int32 (rows, max_pages); cu_query_lens int32 (rows + 1,);
    kv_lens int32 (rows,), the chunks included; window 0 is none.
    """
    total, query_heads, head_dim = q.shape
    rows = len(kv_lens)
    page_size, kv_heads = k.shape[1:3]
    group = query_heads // kv_heads
    assert q.stride()[1:] == (head_dim, 1)
    assert k.is_contiguous()
    assert v.is_contiguous()
    dims = triton.next_power_of_2(head_dim)
    # float32 has no fast matrix product and twice the bytes.
    small = q.dtype == torch.float32 or dims > 128
    block = max(32 if small else 64, triton.next_power_of_2(group))
    out = torch.empty((total, query_heads, head_dim), dtype=q.dtype, device=q.device)
    _prefill_kernel[(kv_heads, total // (block // group) + rows)](
        q, k, v, page_table, cu_query_lens, kv_lens, out,
        rows, q.stride(0), page_table.stride(0), window or 1 << 30, math.log2(math.e) * head_dim**-0.5,
        HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=page_size,
        M=block, D=dims, TILE=32 if small else 64, num_warps=4, num_stages=2 if small else 3,
    )  # fmt: skip
    return out


@jit
def _flatten_kernel(
    table: tl.tensor, lens: tl.tensor, starts: tl.tensor,
    pages: tl.tensor, filled: tl.tensor, rows: tl.tensor, table_stride: tl.tensor,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
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
    """Write a page table as compressed rows: `pages[starts[r] : starts[r + 1]]` are the pages in use by row r.

    page_table int32 (B, max_pages), kv_lens int32 (B,) at least 1; out, all int32: starts (B + 1,), pages (as many as
    are in use or more,), filled (B,), the tokens in each row's last page.
    """
    rows = len(kv_lens)
    _flatten_kernel[(rows,)](
        page_table, kv_lens, starts, pages, filled, rows, page_table.stride(0), PAGE=page_size, BLOCK=256, num_warps=4
    )
