"""RMS norm, SwiGLU and the fused rotary embedding with KV write against their twins in `core.ops`."""

import pytest
import torch

from minisgl.core import ops as reference
from minisgl.core.ops import RopeStore
from minisgl.gpu.kernels import elementwise
from minisgl.gpu.kernels.elementwise import add_rms_norm, rms_norm, rope_store_kv, silu_mul

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
POISON = 77.0


@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (3, 576), (5, 1000), (2, 5120), (1, 8192)])
def test_norms_are_the_references_and_the_sum_is_rounded_into_the_residual(
    rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(rows + dim)
    x, residual = torch.randn(2, rows, dim, dtype=dtype, device=device).unbind()
    weight = torch.randn(dim, dtype=dtype, device=device)
    expected = reference.rms_norm(3 * x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(3 * x, weight, 1e-6), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    actual = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_narrow_rows_share_a_thread_block_and_rows_may_be_strided(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    strided, weight = torch.randn(37, 3, 96, device=device)[:, 1], torch.randn(96, device=device)
    for x in (strided, strided.contiguous()):
        torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
        monkeypatch.setattr(elementwise, "FILLING_ROWS", 1)


def test_no_rows_give_no_rows(device: torch.device) -> None:
    assert rms_norm(torch.empty(0, 64, device=device), torch.ones(64, device=device), 1e-6).shape == (0, 64)
    assert silu_mul(torch.empty(0, 64, device=device)).shape == (0, 32)
    qkv, cos_sin, cache = (torch.ones(shape, device=device) for shape in ((0, 512), (8, 64), (1, 16, 2, 64)))
    none = torch.empty(0, dtype=torch.int32, device=device)
    rope = RopeStore(rope_store_kv, None, None, 1e-6, cos_sin, none, none.long(), cache, cache.clone())
    assert rope(qkv).shape == (0, 4, 64)


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 768), (2, 1536), (5, 1000)])
def test_activation_is_the_references(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(width)
    gate_up = 4 * torch.randn(rows, 2 * width, dtype=dtype, device=device)
    torch.testing.assert_close(silu_mul(gate_up), reference.silu_mul(gate_up), rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "page_size", "index_dtype", "with_norm"),
    [
        (1, 9, 3, 64, 16, torch.int32, False),
        (5, 4, 2, 128, 1, torch.int64, True),
        (3, 40, 8, 128, 16, torch.int64, False),
        (3, 40, 8, 128, 16, torch.int32, True),
        (4, 2, 1, 80, 4, torch.int64, True),
        (2, 16, 16, 6, 256, torch.int32, False),
    ],
)
def test_rope_store_kv_is_the_references(
    tokens: int, heads: int, kv_heads: int, head_dim: int, page_size: int, index_dtype: torch.dtype, with_norm: bool,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    torch.manual_seed(tokens + heads)
    pages, max_positions = 1 + (8 + page_size - 1) // page_size, 50
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    q_norm, k_norm = torch.randn(2, head_dim, device=device).to(dtype).unbind() if with_norm else (None, None)
    angles = torch.rand(max_positions, head_dim // 2, device=device) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions = torch.randint(max_positions, (tokens,), dtype=torch.int32, device=device)
    slot_mapping = torch.randperm(pages * page_size, device=device)[:tokens].to(index_dtype)
    k_cache, v_cache = torch.full((2, pages, page_size, kv_heads, head_dim), POISON, device=device).to(dtype).unbind()
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    ours = RopeStore(rope_store_kv, q_norm, k_norm, 1e-6, cos_sin, positions, slot_mapping, k_cache, v_cache)
    theirs = ours._replace(slot_mapping=slot_mapping.long(), k_cache=k_expected, v_cache=v_expected)
    expected, actual = reference.rope_store_kv(qkv, theirs), ours(qkv)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(k_cache, k_expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(v_cache, v_expected)
