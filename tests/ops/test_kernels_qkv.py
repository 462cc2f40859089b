"""The fused QKV kernel against norm, rotation and KV write one after the other."""

from __future__ import annotations

import pytest
import torch

from minisgl.core import ops as reference
from minisgl.gpu.kernels.qkv import rope_store_kv

POISON = 77.0
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "page_size"),
    [
        (1, 9, 3, 64, 16),
        (5, 4, 2, 128, 1),
        (3, 40, 8, 128, 16),
        (4, 2, 1, 80, 4),
        (2, 16, 16, 6, 256),
        (0, 4, 2, 64, 16),
    ],
)
def test_fused_step_is_the_references(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    with_norm: bool,
    index_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(tokens + heads)
    pages, max_positions = 1 + (8 + page_size - 1) // page_size, 50
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    q_norm, k_norm = torch.randn(2, head_dim, device=device).to(dtype).unbind() if with_norm else (None, None)
    angles = torch.rand(max_positions, head_dim // 2, device=device) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.randint(max_positions, (tokens,), dtype=torch.int32, device=device)
    locations = torch.randperm(pages * page_size, device=device)[:tokens].to(index_dtype)
    k_cache, v_cache = torch.full((2, pages, page_size, kv_heads, head_dim), POISON, device=device).to(dtype).unbind()
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    parts = qkv.view(tokens, heads + 2 * kv_heads, head_dim)
    q, k, v = parts.tensor_split([heads, heads + kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = reference.rms_norm(q, q_norm, 1e-6), reference.rms_norm(k, k_norm, 1e-6)
    angles_of = cos_sin[positions.long()]
    reference.store_kv(reference.apply_rope(k, angles_of), v, k_expected, v_expected, locations.long())

    actual = rope_store_kv(qkv, q_norm, k_norm, 1e-6, cos_sin, positions, locations, k_cache, v_cache)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, reference.apply_rope(q, angles_of), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(k_cache, k_expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(v_cache, v_expected)
