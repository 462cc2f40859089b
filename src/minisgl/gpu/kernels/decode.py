"""Decode attention in which every program (thread block) reads the same share of the cache. Twin: `TorchAttention`.
At the end, the kernels that begin and end a captured decode step; their test says in plain torch what they do.

With many rows of like lengths, each pair of row and KV head is a program. Otherwise the tiles of all rows are numbered
through, and each program takes an equal range of them (Stream-K, Osama et al., arXiv 2301.03598): a range holds the end
of one row, some whole rows and the start of another. The program that finishes last with its part of a split row merges
the row's partial results. So no length of any row leaves multiprocessors idle, and one launch serves every batch.

`run_qkv` takes the QKV GEMM's output itself: it does the work of `core.ops.rope_store_kv` too. A row's new key starts
the softmax from registers; the program that has the row's end writes it to the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.attention import PlannedAttention
from minisgl.core.decoder import ForwardBatch
from minisgl.core.kv_cache import DeviceTables, KVCache
from minisgl.core.ops import RopeStore
from minisgl.core.quantization import FP8
from minisgl.gpu.attention.interface import SHARED_PAIRS, DeviceBatch
from minisgl.gpu.kernels.attention import MIN_DOT, NO_WINDOW, key_value, online_softmax, softmax_weights
from minisgl.gpu.kernels.jit import after_previous, cdiv, jit, jit_varying, launch_options, next_power_of_2

STEP_BLOCK = 1024
ROWS_BLOCK = 256  # rows looked at together, at least; one kernel serves all batches up to it
FP8_SHRINK = tl.constexpr(256.0)  # what `_unpack` divides by
MERGED = tl.constexpr(4)  # partial results of a row merged at a time
TOKEN_BYTES = 256  # of a key head in the measurements behind `decode_split`; where it has more, tiles have fewer tokens


class DecodeSplit(NamedTuple):
    tile: int  # tokens per tile
    warps: int
    stages: int  # of the pipeline
    programs: int  # per multiprocessor; 0: one for each row and KV head


@jit_varying("rows", "lens")
def _tiles_kernel(
    lens: tensor, starts: tensor, rows: tensor, window: tensor, NEW: constexpr, TILE: constexpr, BLOCK: constexpr,
    PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    before = 0
    tl.store(starts, 0)
    for low in range(0, rows, BLOCK):
        row = low + tl.arange(0, BLOCK)
        length = tl.load(lens + row, mask=row < rows, other=0)
        first = tl.maximum(length - window, 0) // TILE * TILE
        tiles = tl.maximum(tl.cdiv(length - NEW - first, TILE), 1)
        tiles = tl.where((row < rows) & (length > 0), tiles, 0)  # rows without tokens, the last ones, pad a graph
        tl.store(starts + 1 + row, before + tl.cumsum(tiles, 0), mask=row < rows)
        before += tl.sum(tiles, 0)


@jit
def _rotated(
    x: tensor, norm: tensor, cos_sin: tensor, position: tensor, dims: tensor, mask: tensor, eps: tensor,
    HEAD_DIM: constexpr, NORM: constexpr,
) -> tensor:  # fmt: skip
    # Heads at the pointers x (heads, 1), normed and rotated -> (heads, D), with the roundings of `rope_store_kv`.
    HALF: tl.constexpr = HEAD_DIM // 2
    other = tl.where(dims < HALF, dims + HALF, dims - HALF)  # the dimension that is rotated together with this one
    near = tl.load(x + dims[None, :], mask=mask, other=0.0)
    far = tl.load(x + other[None, :], mask=mask, other=0.0)
    inside = dims < HEAD_DIM
    if NORM:
        wide = near.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
        near_gain = tl.load(norm + dims, mask=inside, other=0.0).to(tl.float32)[None, :]
        far_gain = tl.load(norm + other, mask=inside, other=0.0).to(tl.float32)[None, :]
        near = ((wide * scale).to(near.dtype).to(tl.float32) * near_gain).to(near.dtype)
        far = ((far.to(tl.float32) * scale).to(far.dtype).to(tl.float32) * far_gain).to(far.dtype)
    angle = cos_sin + position.to(tl.int64) * HEAD_DIM + dims % HALF
    cos = tl.load(angle, mask=inside, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=inside, other=0.0)[None, :]
    sin = tl.where((dims < HALF)[None, :], -sin, sin)
    return (near.to(tl.float32) * cos + far.to(tl.float32) * sin).to(near.dtype)


@jit
def _unpack(pairs: tensor) -> Any:
    # Pairs of neighbouring FP8 numbers as int16 -> the first and the second of each, divided by 256, in float16.
    # Bytes of FP8 cannot be transposed on their way to the tensor cores; pairs can, and float16 with an exponent field
    # of the same value is 2 ** 8 times smaller.
    first = tl.inline_asm_elementwise(
        "{.reg .b32 a, b; shl.b32 a, $1, 7; shl.b32 b, $1, 8; and.b32 a, a, 0x3f803f80; and.b32 b, b, 0x80008000; "
        "or.b32 $0, a, b;}",
        "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip
    second = tl.inline_asm_elementwise(
        "{.reg .b32 a, b; shr.b32 a, $1, 1; and.b32 b, $1, 0x80008000; and.b32 a, a, 0x3f803f80; or.b32 $0, a, b;}",
        "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip
    return first, second


@jit
def _merged(
    partial: tensor, log_sums: tensor, first: tensor, last: tensor, second: tensor, mask: tensor, inner: tensor,
    member: tensor, GROUP: constexpr, HEAD_DIM: constexpr, M: constexpr, D: constexpr,
) -> tensor:  # fmt: skip
    # Merges a row's partial results, in slot `second` (0 or 1) of program `first` and slot 0 of those up to `last`.
    # Other multiprocessors wrote them, so the loads bypass this one's L1 cache (.cg).
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    for low in range(first, last + 1, MERGED):
        for offset in tl.static_range(MERGED):  # unrolled, so that the loads are in flight together
            program = low + offset
            place = 2 * program + tl.where(program == first, second, 0)
            there = (member < GROUP) & (program + 0 * member <= last)
            source = partial + place * (GROUP * HEAD_DIM) + inner
            part = tl.load(source, mask=mask & there[:, None], other=0.0, cache_modifier=".cg")
            log_sum = tl.load(log_sums + place * GROUP + member, mask=there, other=float("-inf"), cache_modifier=".cg")
            peak = tl.maximum(best, log_sum)
            base = tl.where(peak == float("-inf"), 0.0, peak)
            shrink, weight = tl.exp2(best - base), tl.exp2(log_sum - base)
            acc = acc * shrink[:, None] + part * weight[:, None]
            total = total * shrink + weight
            best = peak
    return acc / tl.where(member < GROUP, total, 1.0)[:, None]


@jit_varying("rows", "lens", "table_stride")
def _decode_kernel(
    q: tensor, q_norm: tensor, k_norm: tensor, cos_sin: tensor, k: tensor, v: tensor, table: tensor, lens: tensor,
    starts: tensor, out: tensor, partial: tensor, log_sums: tensor, arrived: tensor, eps: tensor, q_stride: tensor,
    rows: tensor, table_stride: tensor, window: tensor, scale: tensor, FUSED_ROPE: constexpr, NORM: constexpr,
    HEADS: constexpr, GROUP: constexpr, HEAD_DIM: constexpr, PAGE: constexpr, ROWS: constexpr, M: constexpr,
    D: constexpr, TILE: constexpr, WHOLE: constexpr, FP8: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    NEW: tl.constexpr = 1 if FUSED_ROPE else 0  # tokens of a row that are not in the cache yet
    head, program = tl.program_id(0), tl.program_id(1)
    # A program's range depends on lengths, pages and `starts`, all written before the step's embedding lookup, a kernel
    # of torch without PDL, which no later kernel overtakes. So they may be read before the previous kernel ends.
    if not (FUSED_ROPE and PDL):
        after_previous(PDL)
    if WHOLE:
        programs, tiles, tile, stop, row = 1, 1, 0, 1, program
    else:
        tiles = tl.load(starts + rows)
        programs = tl.maximum(tl.minimum(tl.num_programs(1), tiles), 1)
        tile, stop = program * tiles // programs, (program + 1) * tiles // programs
        candidate = tl.arange(0, ROWS)
        row = tl.sum((tl.load(starts + candidate, mask=candidate < rows, other=1 << 30) <= tile).to(tl.int32), 0) - 1
        if program >= programs:
            return
    range_start = tile
    if FUSED_ROPE and PDL:
        after_previous(PDL)

    member, dims = tl.arange(0, M), tl.arange(0, D)
    heads = head * GROUP + member
    inside = (dims < HEAD_DIM)[None, :]
    mask = (member < GROUP)[:, None] & inside
    inner = member[:, None] * HEAD_DIM + dims[None, :]
    pairs_k, pairs_v = k.to(tl.pointer_type(tl.int16), bitcast=True), v.to(tl.pointer_type(tl.int16), bitcast=True)
    pair = tl.arange(0, D // 2)
    partial += head * tl.num_programs(1) * (2 * GROUP * HEAD_DIM)
    log_sums += head * tl.num_programs(1) * (2 * GROUP)
    while tile < stop:
        if WHOLE:
            begin, end, until = 0, 1, 1
        else:
            begin, end = tl.load(starts + row), tl.load(starts + row + 1)
            until = tl.minimum(end, stop)
        length = tl.load(lens + row)
        oldest = length - window  # negative without a window
        line = table + row.to(tl.int64) * table_stride
        source = q + row.to(tl.int64) * q_stride
        best = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        if FUSED_ROPE:
            query = _rotated(
                source + heads[:, None] * HEAD_DIM, q_norm, cos_sin, length - 1, dims, mask, eps, HEAD_DIM, NORM
            )
            if until == end:
                one = tl.zeros([1, 1], tl.int32)
                key_source = source + (HEADS * GROUP + head) * HEAD_DIM + one
                new_key = _rotated(key_source, k_norm, cos_sin, length - 1, dims, inside, eps, HEAD_DIM, NORM)
                new_value = tl.load(key_source + HEADS * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
                page = tl.load(line + (length - 1) // PAGE).to(tl.int64)
                location = ((page * PAGE + (length - 1) % PAGE) * HEADS + head) * HEAD_DIM + dims[None, :]
                kept_key, kept_value = new_key.to(k.dtype.element_ty), new_value.to(v.dtype.element_ty)
                tl.store(k + location, kept_key, mask=inside)
                tl.store(v + location, kept_value, mask=inside)
                new_key, new_value = kept_key.to(query.dtype), kept_value.to(query.dtype)
                best = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1) * scale
                total = tl.full([M], 1.0, tl.float32)
                acc += new_value.to(tl.float32)
        else:
            query = tl.load(source + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        first = tl.maximum(oldest, 0) // TILE * TILE
        low = first + (tile - begin) * TILE
        high = length - NEW if WHOLE else tl.minimum(first + (until - begin) * TILE, length - NEW)
        if FP8:
            narrow = tl.clamp(query.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
            query_first, query_second = tl.split(tl.reshape(narrow, (M, D // 2, 2)))
            best_of_new, acc_first = best, tl.zeros([M, D // 2], tl.float32)
            acc_second = acc_first
        for start in range(low, high, TILE):
            tokens = start + tl.arange(0, TILE)
            seen = (tokens < high) & (tokens >= oldest)
            if FP8:
                key, value = key_value(
                    pairs_k, pairs_v, line, start, tokens, seen, head * (HEAD_DIM // 2), pair, PAGE,
                    HEADS * (HEAD_DIM // 2), HEAD_DIM // 2, TILE,
                )  # fmt: skip
                key_first, key_second = _unpack(key)
                value_first, value_second = _unpack(value)
                scores = tl.dot(query_second, key_second, tl.dot(query_first, key_first))
                weights, shrink, best, total = softmax_weights(scores, seen[None, :], scale * FP8_SHRINK, best, total)
                weights = weights.to(tl.float16)
                acc_first = acc_first * shrink + tl.dot(weights, value_first)
                acc_second = acc_second * shrink + tl.dot(weights, value_second)
            else:
                key, value = key_value(
                    k, v, line, start, tokens, seen, head * HEAD_DIM, dims, PAGE, HEADS * HEAD_DIM, HEAD_DIM, TILE
                )
                acc, best, total = online_softmax(query, key, value, seen[None, :], scale, acc, best, total)
        if FP8:
            kept = tl.where(best_of_new == float("-inf"), 0.0, tl.exp2(best_of_new - best))
            acc = acc * kept[:, None] + FP8_SHRINK * tl.interleave(acc_first, acc_second)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # 0 for a row without tokens
        result = out + (row.to(tl.int64) * HEADS + head) * (GROUP * HEAD_DIM)
        if WHOLE or ((begin >= range_start) & (end <= stop)):
            tl.store(result + inner, acc.to(out.dtype.element_ty), mask=mask)
        else:
            place = 2 * program + tl.where(tile > range_start, 1, 0)
            tl.store(partial + place * (GROUP * HEAD_DIM) + inner, acc, mask=mask)
            tl.store(log_sums + place * GROUP + member, best + tl.log2(total), mask=member < GROUP)
            first_program = ((begin + 1) * programs - 1) // tiles
            last_program = (end * programs - 1) // tiles
            tl.debug_barrier()  # every thread has written its share before the counter says so
            before = tl.atomic_add(arrived + row * HEADS + head, 1, sem="acq_rel")
            if before == last_program - first_program:
                second = tl.where(first_program * tiles // programs < begin, 1, 0)
                acc = _merged(
                    partial, log_sums, first_program, last_program, second, mask, inner, member, GROUP, HEAD_DIM, M, D
                )
                tl.store(result + inner, acc.to(out.dtype.element_ty), mask=mask)
                tl.store(arrived + row * HEADS + head, 0)
        tile = until
        row += 1


def decode_split(pairs: int, token_bytes: int, fp8: bool = False) -> DecodeSplit:
    # The fastest measured on an H200 with pages of 16, for so many pairs of row and KV head; a token's key has
    # `token_bytes`. Five stages are two tiles in flight, seven are three, as the page ids take the first.
    if fp8 and pairs > SHARED_PAIRS:
        return DecodeSplit(32, 1, 5, 0) if pairs >= 1100 else DecodeSplit(64, 2, 5, 0)
    if pairs >= 1100:
        split = DecodeSplit(16, 1, 7, 0)
    else:
        split = DecodeSplit(16, 1, 5, 8) if pairs >= 200 else DecodeSplit(128, 4, 2, 2)
    tile = split.tile * TOKEN_BYTES // next_power_of_2(token_bytes)
    return split._replace(tile=max(16, min(split.tile, tile)))


class Workspaces:
    """Buffers shared by all steps of one stream. Graphs know their addresses, so they are kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._partial: dict[tuple[int, ...], Tensor] = {}
        self._counters: list[Tensor] = []

    def partial(self, *shape: int) -> Tensor:
        """float32 of this shape, for what one launch writes and reads."""
        if shape not in self._partial:
            self._partial[shape] = torch.empty(shape, dtype=torch.float32, device=self.device)
        return self._partial[shape]

    def counters(self, count: int) -> Tensor:
        """At least so many int32, zero between launches. A capture finds them only if as many were asked for before."""
        enough = next((counters for counters in self._counters if len(counters) >= count), None)
        if enough is None:
            enough = torch.zeros(next_power_of_2(count), dtype=torch.int32, device=self.device)
            self._counters.append(enough)
        return enough


class DecodeAttention(PlannedAttention):
    """Decode attention of B rows over one cache. A step starts with `begin`, or with `run` of layer 0.

    The rows' pages int32 (B, max_pages) and lengths int32 (B,), at least 1, are read at each launch.
    """

    def __init__(
        self, rows: DeviceBatch, kv: KVCache, workspaces: Workspaces, processors: int, split: DecodeSplit | None = None
    ) -> None:
        self.page_table, self.kv_lens, self.kv = rows.page_table, rows.kv_lens, kv
        self.workspaces, self.processors = workspaces, processors
        kv_heads, head_dim = kv.k.shape[3:]
        pairs = len(rows.kv_lens) * kv_heads
        if not rows.even:
            pairs = min(pairs, SHARED_PAIRS)
        self.split = split or decode_split(pairs, head_dim * kv.k.element_size(), kv.k.dtype == FP8)
        self._starts: dict[tuple[int, bool], Tensor] = {}
        self._current: set[tuple[int, bool]] = set()

    def begin(self, windows: Sequence[int]) -> None:
        """Number the rows' tiles for `run_qkv` in layers with these windows."""
        self._current.clear()
        for window in dict.fromkeys(windows if self.split.programs else ()):
            self._tiles(window, new=True)

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        """Attention of q (B, H, hd), whose keys and values are in the cache -> (B, H, hd)."""
        assert q.stride()[1:] == (q.shape[2], 1)
        if layer == 0:
            self._current.clear()
        return self._launch(q, q.shape[1], None, layer, window)

    def run_qkv(self, qkv: Tensor, rope: RopeStore, layer: int, window: int) -> Tensor:
        """The same from qkv (B, (H + 2K) * hd), writing key and value of each row's last token -> (B, H, hd)."""
        assert qkv.is_contiguous()
        kv_heads, head_dim = self.kv.k.shape[3:]
        return self._launch(qkv, qkv.shape[1] // head_dim - 2 * kv_heads, rope, layer, window)

    def _launch(self, q: Tensor, heads: int, rope: RopeStore | None, layer: int, window: int) -> Tensor:
        k, v = self.kv.k[layer], self.kv.v[layer]
        page_size, kv_heads, head_dim = k.shape[1:]
        rows, group, split = len(self.kv_lens), heads // kv_heads, self.split
        whole = split.programs == 0
        programs = rows if whole else max(1, split.programs * self.processors // kv_heads)
        out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
        partial = log_sums = out
        starts = arrived = self.kv_lens
        if not whole:
            # A program's up to two partial results, and the log2 of their softmax sums.
            partial = self.workspaces.partial(kv_heads, programs, 2, group, head_dim)
            log_sums = self.workspaces.partial(kv_heads, programs, 2, group)
            arrived = self.workspaces.counters(rows * kv_heads)  # partial results written of each row and KV head
            starts = self._tiles(window, rope is not None)
        q_norm, k_norm, eps, cos_sin = (None, None, 0.0, None) if rope is None else rope[1:5]
        _decode_kernel[(kv_heads, programs)](
            q, q_norm, k_norm, cos_sin, k, v, self.page_table, self.kv_lens, starts, out, partial, log_sums, arrived,
            eps, q.stride(0), rows, self.page_table.stride(0), window or NO_WINDOW, math.log2(math.e) * head_dim**-0.5,
            FUSED_ROPE=rope is not None, NORM=q_norm is not None, HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
            PAGE=page_size, ROWS=max(ROWS_BLOCK, next_power_of_2(rows)),
            M=max(MIN_DOT, next_power_of_2(group)), D=next_power_of_2(head_dim), TILE=split.tile,
            WHOLE=whole, FP8=k.dtype == FP8, num_warps=split.warps, num_stages=split.stages, **launch_options(),
        )  # fmt: skip
        return out

    def _tiles(self, window: int, new: bool) -> Tensor:
        """The number of each row's first tile, int32 (B + 1,): computed once a step for each window."""
        which, rows = (window, new), len(self.kv_lens)
        if which not in self._starts:
            self._starts[which] = torch.empty(rows + 1, dtype=torch.int32, device=self.kv_lens.device)
        starts = self._starts[which]
        if which not in self._current:
            self._current.add(which)
            _tiles_kernel[(1,)](
                self.kv_lens, starts, rows, window or NO_WINDOW, NEW=int(new), TILE=self.split.tile, BLOCK=ROWS_BLOCK,
                num_warps=4, **launch_options(),
            )  # fmt: skip
        return starts


@jit
def _gather_kernel(
    changes: tensor, last_token: tensor, length: tensor, page_table: tensor, ids: tensor, positions: tensor,
    kv_lens: tensor, slot_mapping: tensor, pages: tensor, batch: tensor, width: tensor, page_size: tensor,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0)
    slot = tl.load(changes + row).to(tl.int64)
    new_index = tl.load(changes + batch + row)
    new_page = tl.load(changes + 2 * batch + row)
    position = tl.load(length + slot)
    table = page_table + slot * width
    if new_index >= 0:
        tl.store(table + new_index, new_page)
    tl.store(ids + row, tl.load(last_token + slot))
    tl.store(positions + row, position)
    tl.store(kv_lens + row, position + 1)
    here = position // page_size
    page = tl.where(new_index == here, new_page, tl.load(table + here))
    tl.store(slot_mapping + row, page.to(tl.int64) * page_size + position % page_size)
    for start in range(0, here + 1, BLOCK):
        index = start + tl.arange(0, BLOCK)
        held = tl.load(table + index, mask=index <= here, other=0)
        held = tl.where(index == new_index, new_page, held)
        tl.store(pages + row.to(tl.int64) * width + index, held, mask=index <= here)


def gather_rows(changes: Tensor, tables: DeviceTables, batch: ForwardBatch, rows: DeviceBatch, page_size: int) -> None:
    """Write new pages into the tables, and into `batch` and `rows` what the rows' next tokens need.

    changes int32 (3, B), all that the host sends for a decode step: the rows' slots in the tables, the index in its
    page table at which a row gets a new page (-1: none), and that page. Behind a row's last page nothing is written.
    """
    count, width = rows.page_table.shape
    _gather_kernel[(count,)](
        changes, tables.last_token, tables.length, tables.page_table, batch.ids, batch.positions, rows.kv_lens,
        batch.slot_mapping, rows.page_table, count, width, page_size, BLOCK=STEP_BLOCK, num_warps=4,
        **launch_options(),
    )  # fmt: skip


@jit
def _commit_kernel(
    changes: tensor, tokens: tensor, kv_lens: tensor, last_token: tensor, length: tensor, batch: tensor,
    padding: tensor, BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = row < batch
    slot = tl.load(changes + row, mask=within, other=0).to(tl.int64)
    live = within & (slot != padding)
    tl.store(last_token + slot, tl.load(tokens + row, mask=within, other=0), mask=live)
    tl.store(length + slot, tl.load(kv_lens + row, mask=within, other=0), mask=live)


def commit_rows(changes: Tensor, tokens: Tensor, tables: DeviceTables, rows: DeviceBatch) -> None:
    """Write the sampled tokens int32 (B,) and the new lengths back to the rows that are not padding."""
    count = len(tokens)
    _commit_kernel[(cdiv(count, STEP_BLOCK),)](
        changes, tokens, rows.kv_lens, tables.last_token, tables.length, count, len(tables.length) - 1,
        BLOCK=STEP_BLOCK, **launch_options(),
    )  # fmt: skip
