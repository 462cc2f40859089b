"""From the QKV product to what attention reads: head norms, rotation, and the write into the pages, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minisgl.gpu.kernels.jit import after_previous, jit, jit_varying, launch_options, warps_for

TILE = 1024
"""Elements a program takes: 8 heads of 128."""


@jit
def _head_norm(
    low: tl.tensor,
    high: tl.tensor,
    weight: tl.tensor,
    columns: tl.tensor,
    half: tl.tensor,
    mask: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    gain_low = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    gain_high = tl.load(weight + half + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    square = tl.sum(wide_low * wide_low + wide_high * wide_high, axis=1)
    scale = tl.rsqrt(square / (2 * half) + eps)[:, None]
    normed_low = (wide_low * scale).to(low.dtype).to(tl.float32) * gain_low
    normed_high = (wide_high * scale).to(low.dtype).to(tl.float32) * gain_high
    return normed_low.to(low.dtype), normed_high.to(low.dtype)


@jit_varying("positions", "locations")
def _qkv_kernel(
    qkv: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, cos_sin: tl.tensor, positions: tl.tensor,
    locations: tl.tensor, q_out: tl.tensor, k_cache: tl.tensor,
    v_cache: tl.tensor, eps: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, half: tl.tensor,
    NORM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    # Programs of a token: blocks of query heads first, then of key heads, then of value heads.
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
    location = tl.load(locations + token).to(tl.int64)

    source = qkv + (token * (heads + 2 * kv_heads) + before + head)[:, None] * (2 * half) + column[None, :]
    low = tl.load(source, mask=mask, other=0.0)  # (BLOCK_HEADS, BLOCK_HALF) dimensions 0 … hd/2 - 1
    high = tl.load(source + half, mask=mask, other=0.0)
    if is_value:
        target = v_cache + (location * kv_heads + head)[:, None] * (2 * half) + column[None, :]
        tl.store(target, low, mask=mask)
        tl.store(target + half, high, mask=mask)
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
        turned_low = (wide_low * cos - wide_high * sin).to(low.dtype)
        turned_high = (wide_high * cos + wide_low * sin).to(low.dtype)
        if is_query:
            target = q_out + (token * heads + head)[:, None] * (2 * half) + column[None, :]
            tl.store(target, turned_low, mask=mask)
            tl.store(target + half, turned_high, mask=mask)
        else:
            target = k_cache + (location * kv_heads + head)[:, None] * (2 * half) + column[None, :]
            tl.store(target, turned_low, mask=mask)
            tl.store(target + half, turned_high, mask=mask)


def rope_store_kv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    locations: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Norm (where weights are given) and rotate queries and keys, write keys and values, return the queries.

    qkv (T, (H + 2K) * hd), bias added; q_norm, k_norm (hd,) or None; cos_sin float32 (max_seq_len, hd), cosines first;
    positions int32 (T,); locations int32 or int64 (T,) = page * page_size + offset; k_cache, v_cache one layer's pages
    (pages, page_size, K, hd) -> (T, H, hd), `out` where it is given. All contiguous. The references are `rms_norm`,
    `apply_rope` and `store_kv`.
    """
    kv_heads, head_dim = k_cache.shape[2:]
    tokens = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert qkv.is_contiguous()
    assert k_cache.is_contiguous()
    assert v_cache.is_contiguous()
    q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    if tokens:
        pdl = launch_options()
        half = triton.next_power_of_2(head_dim // 2)
        block = min(max(1, TILE // (2 * half)), triton.next_power_of_2(max(heads, kv_heads)))
        programs = triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block)
        _qkv_kernel[(tokens, programs)](
            qkv, q_norm, k_norm, cos_sin, positions, locations, q, k_cache, v_cache, eps, heads, kv_heads,
            head_dim // 2, NORM=q_norm is not None, BLOCK_HEADS=block, BLOCK_HALF=half,
            num_warps=warps_for(block * half), PDL=bool(pdl), **pdl,
        )  # fmt: skip
    return q
