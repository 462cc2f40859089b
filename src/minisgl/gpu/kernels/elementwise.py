"""The kernels between GEMMs: RMS norm, SwiGLU, quantisation, rotary embedding with KV write.

Each reads and writes its operands once. All twins are in `core/ops.py` and have the same names; the kernels round where
they round. What an FP8 weight reads next is quantised by the kernel that makes it.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.ops import RopeStore
from minisgl.core.quantization import BLOCK, FP8, FP8_MAX, Fp8Rows, Fp8Weight, Weight
from minisgl.gpu.kernels import fp8_rows
from minisgl.gpu.kernels.jit import after_previous, cdiv, jit, jit_varying, launch_options, next_power_of_2, warps_for

MAX_NORM_DIM = 8192
NORM_TILE = 2048  # elements per thread block, at least, when there are enough rows: narrow rows share a block
FILLING_ROWS = 2048  # from this many rows on, every multiprocessor has work even when rows share a block
ACTIVATION_BLOCK = 1024
QKV_TILE = 1024  # elements per thread block: 8 heads of 128
MAX_QUANTIZED = 1 << 15  # elements of a row, which a thread block quantises at once
ALIGNMENT = 16  # of both dimensions of a weight in FP8, for cuBLAS
BLOCK_ALIGNMENT = 4 * BLOCK  # of the inner one with blocks: their scales must be whole groups of four
ROW_STEP = 4  # with blocks, rows are padded to a multiple
MAX = tl.constexpr(FP8_MAX)


def quantizes_for(reader: Weight | None) -> TypeGuard[Fp8Weight]:
    """Whether `linear` by this weight takes rows in FP8."""
    if not isinstance(reader, Fp8Weight):
        return False
    columns, inner = reader.shape
    step, inner_step = (BLOCK, BLOCK_ALIGNMENT) if reader.blocks else (ALIGNMENT, ALIGNMENT)
    return columns % step == 0 and inner % inner_step == 0 and inner <= MAX_QUANTIZED


def in_runs(rows: int, reader: Fp8Weight) -> bool:
    """Whether `linear` by this weight takes so many rows with a scale for each run of 128, else for each row."""
    return reader.blocks or fp8_rows.fits(rows, reader)


def empty_rows(rows: int, width: int, runs: bool, like: Tensor) -> tuple[Fp8Rows, int]:
    """Rows for a kernel to write, with a scale for each or for each run of 128; how many values share a scale."""
    group = BLOCK if runs else next_power_of_2(width)
    groups, padded = cdiv(width, group), -(-rows // ROW_STEP) * ROW_STEP if runs else rows
    data = torch.empty((padded, width), dtype=FP8, device=like.device)
    scale = torch.empty((groups, padded), dtype=torch.float32, device=like.device).t()
    return Fp8Rows(data, scale, rows, like.dtype), group


@jit
def store_quantized(
    wide: tensor, data: tensor, scale: tensor, row: tensor, first: tensor, inside: tensor, width: tensor,
    padded: tensor, ROWS: constexpr, BLOCK: constexpr, GROUP: constexpr,
) -> None:  # fmt: skip
    # Whole groups `wide` (ROWS, BLOCK) from column `first` on, zero outside of `width`; row and inside (ROWS, 1).
    groups = tl.reshape(wide.to(tl.float32), (ROWS, BLOCK // GROUP, GROUP))
    largest = tl.max(tl.abs(groups), axis=2)
    step = tl.where(largest > 0, largest / MAX, 1.0)
    narrow = tl.reshape(tl.clamp(groups / step[:, :, None], -MAX, MAX), (ROWS, BLOCK)).to(data.dtype.element_ty)
    column = first + tl.arange(0, BLOCK)[None, :]
    group = first // GROUP + tl.arange(0, BLOCK // GROUP)[None, :]
    tl.store(data + row * width + column, narrow, mask=inside & (column < width))
    tl.store(scale + group * padded + row, step, mask=inside & (group * GROUP < width))


@jit_varying("padded")
def _quantize_kernel(
    x: tensor, data: tensor, scale: tensor, x_stride: tensor, padded: tensor, width: tensor, GROUP: constexpr,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    wide = tl.load(x + row * x_stride + column, mask=column < width, other=0.0)
    store_quantized(wide, data, scale, row, first, row >= 0, width, padded, 1, BLOCK, GROUP)


def quantize_rows(x: Tensor, runs: bool) -> Fp8Rows:
    """x (T, K), with contiguous rows, and a scale for each or each run of 128. Twin: `core.quantization.quantize`."""
    rows, width = x.shape
    out, group = empty_rows(rows, width, runs, x)
    if rows:
        block, warps = columns_at_once(width, group)
        _quantize_kernel[(rows, cdiv(width, block))](
            x, out.data, out.scale, x.stride(0), len(out.data), width, GROUP=group, BLOCK=block, num_warps=warps,
            **launch_options(),
        )  # fmt: skip
    return out


def columns_at_once(width: int, group: int) -> tuple[int, int]:
    """Elements of a row that a thread block takes, and its warps; `group` of them share a scale, or 0."""
    block = max(group, next_power_of_2(width))
    if group <= BLOCK:
        block = min(ACTIVATION_BLOCK, block)
        return block, warps_for(block)
    return block, max(1, min(16, block // (32 * 16)))  # 16 elements a thread, as a row is all the work that there is


@jit_varying("rows", "padded")
def _norm_kernel(
    x: tensor, residual: tensor, weight: tensor, out: tensor, scale_out: tensor, x_stride: tensor, rows: tensor,
    padded: tensor, dim: tensor, eps: tensor, ADD: constexpr, PARTS: constexpr, GROUP: constexpr, ROWS: constexpr,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, BLOCK)[None, :]  # (1, BLOCK)
    mask = (row < rows) & (column < dim)
    row = row.to(tl.int64)
    gain = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    stored = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if PARTS:
        total = stored.to(tl.float32)
        for part in tl.static_range(1, PARTS):
            partial = x + (part * rows + row) * dim + column
            total += tl.load(partial, mask=mask, other=0.0).to(tl.float32)
        stored = total.to(weight.dtype.element_ty)
    if ADD:
        stream = residual + row * dim + column
        stored = (stored.to(tl.float32) + tl.load(stream, mask=mask, other=0.0).to(tl.float32)).to(stored.dtype)
        tl.store(stream, stored, mask=mask)
    wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / dim + eps)
    normed = (wide * scale[:, None]).to(stored.dtype).to(tl.float32) * gain
    rounded = normed.to(stored.dtype)
    if GROUP:
        store_quantized(rounded, out, scale_out, row, 0, row < rows, dim, padded, ROWS, BLOCK, GROUP)
    else:
        tl.store(out + row * dim + column, rounded, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, reader: Weight | None = None) -> Any:
    """x (T, D) with contiguous rows, weight (D,) -> (T, D), in FP8 where `reader` takes that. D up to 8192."""
    return _launch_norm(x, None, weight, eps, reader)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Weight | None = None) -> Any:
    """residual += x in place, and the norm of the sum. x, residual (T, D) -> (T, D), in FP8 where `reader` takes that.

    x may be float32 (splits, T, D), contiguous, from `linear.split_k_linear`: they are added up and rounded first.
    """
    assert residual.is_contiguous()
    return _launch_norm(x, residual, weight, eps, reader)


def _launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, reader: Weight | None) -> Any:
    rows, dim = x.shape[-2:]
    parts = len(x) if x.dim() == 3 else 0
    assert dim <= MAX_NORM_DIM
    assert x.stride(-1) == 1
    assert not parts or x.is_contiguous()
    out, data, scale, group = _empty(rows, dim, weight, reader)
    if rows:
        block = next_power_of_2(dim)
        rows_per_block = max(1, NORM_TILE // block) if rows >= FILLING_ROWS else 1
        _norm_kernel[(cdiv(rows, rows_per_block),)](
            x, residual, weight, data, scale, x.stride(-2), rows, len(data), dim, eps, ADD=residual is not None,
            PARTS=parts, GROUP=group, ROWS=rows_per_block, BLOCK=block, num_warps=warps_for(rows_per_block * block),
            **launch_options(),
        )  # fmt: skip
    return out


def _empty(rows: int, width: int, like: Tensor, reader: Weight | None) -> tuple[Tensor | Fp8Rows, Tensor, Tensor, int]:
    """What a kernel is to write: (rows, width), in FP8 where `reader` takes that; also its data, scales and group."""
    if quantizes_for(reader):
        quantized, group = empty_rows(rows, width, in_runs(rows, reader), like)
        return quantized, quantized.data, quantized.scale, group
    out = torch.empty((rows, width), dtype=like.dtype, device=like.device)
    return out, out, out, 0


@jit_varying("padded")
def _silu_mul_kernel(
    gate_up: tensor, out: tensor, scale: tensor, padded: tensor, width: tensor, GROUP: constexpr, BLOCK: constexpr,
    PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0)
    hidden = gated(gate, up)
    if GROUP:
        store_quantized(hidden, out, scale, row, first, row >= 0, width, padded, 1, BLOCK, GROUP)
    else:
        tl.store(out + row * width + column, hidden, mask=mask)


@jit
def gated(gate: tensor, up: tensor) -> tensor:
    """silu(gate) * up with the twin's roundings: float32 inside, silu rounded to the dtype of the activations."""
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (silu * up.to(tl.float32)).to(gate.dtype)


def silu_mul(gate_up: Tensor, reader: Weight | None = None) -> Any:
    """gate_up (T, 2I), contiguous, gate first -> (T, I), in FP8 where `reader` takes that."""
    assert gate_up.is_contiguous()
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out, data, scale, group = _empty(rows, width, gate_up, reader)
    if rows:
        block, warps = columns_at_once(width, group)
        _silu_mul_kernel[(rows, cdiv(width, block))](
            gate_up, data, scale, len(data), width, GROUP=group, BLOCK=block, num_warps=warps, **launch_options()
        )
    return out


@jit
def _head_norm(
    low: tensor, high: tensor, weight: tensor, columns: tensor, half: tensor, mask: tensor, eps: tensor
) -> tensor:
    gain_low = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    gain_high = tl.load(weight + half + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    square = tl.sum(wide_low * wide_low + wide_high * wide_high, axis=1)
    scale = tl.rsqrt(square / (2 * half) + eps)[:, None]
    normed_low = (wide_low * scale).to(low.dtype).to(tl.float32) * gain_low
    normed_high = (wide_high * scale).to(low.dtype).to(tl.float32) * gain_high
    return normed_low.to(low.dtype), normed_high.to(low.dtype)


@jit_varying("positions", "slot_mapping")
def _qkv_kernel(
    qkv: tensor, q_norm: tensor, k_norm: tensor, cos_sin: tensor, positions: tensor, slot_mapping: tensor,
    q_out: tensor, k_cache: tensor, v_cache: tensor, eps: tensor, heads: tensor, kv_heads: tensor, half: tensor,
    NORM: constexpr, BLOCK_HEADS: constexpr, BLOCK_HALF: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    # Thread blocks of a token: those of query heads first, then of key heads, then of value heads.
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks, kv_blocks = tl.cdiv(heads, BLOCK_HEADS), tl.cdiv(kv_heads, BLOCK_HEADS)
    is_query, is_value = block < query_blocks, block >= query_blocks + kv_blocks
    first = tl.where(is_query, block, (block - query_blocks) % kv_blocks) * BLOCK_HEADS
    head = first + tl.arange(0, BLOCK_HEADS)  # within its kind
    count = tl.where(is_query, heads, kv_heads)
    before = tl.where(is_query, 0, heads + tl.where(is_value, kv_heads, 0))  # heads of the kinds before
    column = tl.arange(0, BLOCK_HALF)
    within = column < half
    mask = (head < count)[:, None] & within[None, :]
    position = tl.load(positions + token)
    location = tl.load(slot_mapping + token).to(tl.int64)

    source = qkv + (token * (heads + 2 * kv_heads) + before + head)[:, None] * (2 * half) + column[None, :]
    low = tl.load(source, mask=mask, other=0.0)  # (BLOCK_HEADS, BLOCK_HALF) dimensions 0 … hd/2 - 1
    high = tl.load(source + half, mask=mask, other=0.0)
    if is_value:
        value = v_cache + (location * kv_heads + head)[:, None] * (2 * half) + column[None, :]
        tl.store(value, low, mask=mask)
        tl.store(value + half, high, mask=mask)
    else:
        angles = cos_sin + position.to(tl.int64) * (2 * half) + column
        cos = tl.load(angles, mask=within, other=0.0)[None, :]
        sin = tl.load(angles + half, mask=within, other=0.0)[None, :]
        if NORM:
            if is_query:
                low, high = _head_norm(low, high, q_norm, column, half, within, eps)
            else:
                low, high = _head_norm(low, high, k_norm, column, half, within, eps)
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        rotated_low = (wide_low * cos - wide_high * sin).to(low.dtype)
        rotated_high = (wide_high * cos + wide_low * sin).to(low.dtype)
        if is_query:
            query = q_out + (token * heads + head)[:, None] * (2 * half) + column[None, :]
            tl.store(query, rotated_low, mask=mask)
            tl.store(query + half, rotated_high, mask=mask)
        else:
            key = k_cache + (location * kv_heads + head)[:, None] * (2 * half) + column[None, :]
            tl.store(key, rotated_low, mask=mask)
            tl.store(key + half, rotated_high, mask=mask)


def rope_store_kv(qkv: Tensor, rope: RopeStore, out: Tensor | None = None) -> Tensor:
    """Norm (where weights are given) and rotate queries and keys, write keys and values, return the queries.

    qkv (T, (H + 2K) * hd), bias added -> (T, H, hd), `out` where it is given. All contiguous.
    """
    assert all(x.is_contiguous() for x in (qkv, rope.k_cache, rope.v_cache))
    tokens, (kv_heads, head_dim) = len(qkv), rope.k_cache.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    if tokens:
        half = next_power_of_2(head_dim // 2)
        block = min(max(1, QKV_TILE // (2 * half)), next_power_of_2(max(heads, kv_heads)))
        blocks = cdiv(heads, block) + 2 * cdiv(kv_heads, block)
        _qkv_kernel[(tokens, blocks)](
            qkv, rope.q_norm, rope.k_norm, rope.cos_sin, rope.positions, rope.slot_mapping, q, rope.k_cache,
            rope.v_cache, rope.eps, heads, kv_heads, head_dim // 2, NORM=rope.q_norm is not None, BLOCK_HEADS=block,
            BLOCK_HALF=half, num_warps=warps_for(block * half), **launch_options(),
        )  # fmt: skip
    return q
