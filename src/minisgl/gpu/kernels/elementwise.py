"""The kernels between GEMMs: RMS norm, SwiGLU, rotary embedding with KV write. Each reads and writes operands once.

All twins are in `core/ops.py` and have the same names; the kernels round where they round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.gpu.kernels.jit import after_previous, jit, jit_varying, launch_options, warps_for

MAX_NORM_DIM = 8192
NORM_TILE = 2048  # elements per thread block, at least, when there are enough rows: narrow rows share a block
FILLING_ROWS = 2048  # from this many rows on, every multiprocessor has work even when rows share a block
ACTIVATION_BLOCK = 1024
QKV_TILE = 1024  # elements per thread block: 8 heads of 128


@jit_varying("rows")
def _norm_kernel(
    x: tensor, residual: tensor, weight: tensor, out: tensor, x_stride: tensor, rows: tensor, dim: tensor, eps: tensor,
    ADD: constexpr, PARTS: constexpr, ROWS: constexpr, BLOCK: constexpr, PDL: constexpr,
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
        stored = total.to(out.dtype.element_ty)
    if ADD:
        stream = residual + row * dim + column
        stored = (stored.to(tl.float32) + tl.load(stream, mask=mask, other=0.0).to(tl.float32)).to(stored.dtype)
        tl.store(stream, stored, mask=mask)
    wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / dim + eps)
    normed = (wide * scale[:, None]).to(stored.dtype).to(tl.float32) * gain
    tl.store(out + row * dim + column, normed.to(stored.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, D) with contiguous rows, weight (D,) -> (T, D). D up to 8192."""
    return _launch_norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, and the norm of the sum. x, residual (T, D) -> (T, D).

    x may be float32 (splits, T, D), contiguous, from `linear.split_k_linear`: they are added up and rounded first.
    """
    assert residual.is_contiguous()
    return _launch_norm(x, residual, weight, eps)


def _launch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, dim = x.shape[-2:]
    parts = len(x) if x.dim() == 3 else 0
    assert dim <= MAX_NORM_DIM
    assert x.stride(-1) == 1
    assert not parts or x.is_contiguous()
    out = torch.empty((rows, dim), dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(dim)
        rows_per_block = max(1, NORM_TILE // block) if rows >= FILLING_ROWS else 1
        _norm_kernel[(triton.cdiv(rows, rows_per_block),)](
            x, residual, weight, out, x.stride(-2), rows, dim, eps, ADD=residual is not None, PARTS=parts,
            ROWS=rows_per_block, BLOCK=block, num_warps=warps_for(rows_per_block * block), **launch_options(),
        )  # fmt: skip
    return out


@jit
def _silu_mul_kernel(gate_up: tensor, out: tensor, width: tensor, BLOCK: constexpr, PDL: constexpr) -> None:
    after_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=mask, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=mask, other=0.0)
    tl.store(out + row * width + column, gated(gate, up), mask=mask)


@jit
def gated(gate: tensor, up: tensor) -> tensor:
    """silu(gate) * up with the twin's roundings: float32 inside, silu rounded to the dtype of the activations."""
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    return (silu * up.to(tl.float32)).to(gate.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up (T, 2I), contiguous, gate first -> (T, I)."""
    assert gate_up.is_contiguous()
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(ACTIVATION_BLOCK, triton.next_power_of_2(width))
        _silu_mul_kernel[(rows, triton.cdiv(width, block))](
            gate_up, out, width, BLOCK=block, num_warps=warps_for(block), **launch_options()
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


def rope_store_kv(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos_sin: Tensor, positions: Tensor,
    slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Norm (where weights are given) and rotate queries and keys, write keys and values, return the queries.

    qkv (T, (H + 2K) * hd), bias added; q_norm, k_norm (hd,) or None; cos_sin float32 (max_seq_len, hd), cosines first;
    positions int32 (T,); slot_mapping int32 or int64 (T,) = page * page_size + offset; k_cache, v_cache one layer's
    pages (pages, page_size, K, hd) -> (T, H, hd), `out` where it is given. All contiguous.
    """
    assert all(x.is_contiguous() for x in (qkv, k_cache, v_cache))
    tokens, (kv_heads, head_dim) = len(qkv), k_cache.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    if tokens:
        half = triton.next_power_of_2(head_dim // 2)
        block = min(max(1, QKV_TILE // (2 * half)), triton.next_power_of_2(max(heads, kv_heads)))
        blocks = triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block)
        _qkv_kernel[(tokens, blocks)](
            qkv, q_norm, k_norm, cos_sin, positions, slot_mapping, q, k_cache, v_cache, eps, heads, kv_heads,
            head_dim // 2, NORM=q_norm is not None, BLOCK_HEADS=block, BLOCK_HALF=half,
            num_warps=warps_for(block * half), **launch_options(),
        )  # fmt: skip
    return q
