import pytest
import torch

from helpers.models import tiny_spec
from minisgl.core.kv_cache import allocate_kv, page_bytes
from minisgl.core.ops import add_rms_norm, apply_rope, linear, moe, pack, rms_norm, silu_mul, store_kv

CPU = torch.device("cpu")
SPEC = tiny_spec(num_layers=2, num_kv_heads=2, head_dim=5)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x, weight = torch.randn(3, 5, 8), torch.randn(8)
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), exact, atol=1e-6)
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # whose square is infinite in float16
    assert torch.equal(rms_norm(x, torch.ones(4, dtype=torch.float16), 1e-6), torch.ones(1, 4, dtype=torch.float16))


def test_add_rms_norm_moves_the_residual_stream() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total = x + residual
    assert torch.equal(add_rms_norm(x, residual, weight, 1e-6), rms_norm(total, weight, 1e-6))
    assert torch.equal(residual, total)


def test_silu_mul_gates_the_second_half() -> None:
    gate, up = torch.randn(3, 6), torch.randn(3, 6)
    both = torch.cat([gate, up], dim=-1)
    kept = both.clone()
    assert torch.allclose(silu_mul(both), gate * torch.sigmoid(gate) * up, atol=1e-6)
    assert torch.equal(both, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_rotates_pairs_as_complex_numbers(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 8).to(dtype)
    angles = torch.randn(5, 4)
    rotated = torch.complex(x[..., :4].float(), x[..., 4:].float()) * torch.polar(torch.ones(5, 1, 4), angles[:, None])
    exact = torch.cat([rotated.real, rotated.imag], dim=-1)
    ours = apply_rope(x, torch.cat([angles.cos(), angles.sin()], dim=-1))
    assert ours.dtype == dtype
    assert torch.allclose(ours.float(), exact, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_store_kv_writes_its_places_and_no_other() -> None:
    kv = allocate_kv(SPEC, 3, 4, torch.float32, CPU)
    k, v = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    places = torch.tensor([7, 0, 15])
    store_kv(k, v, kv.k[1], kv.v[1], places)
    for written, cache in ((k, kv.k), (v, kv.v)):
        assert torch.equal(cache[1].view(16, 2, 5)[places], written)
        assert int((cache != 0).sum()) == int((written != 0).sum())


def test_kv_cache_has_a_scratch_page_and_any_dtype() -> None:
    kv = allocate_kv(SPEC, 3, 4, torch.bfloat16, CPU)
    assert (kv.k.shape, kv.v.shape, kv.k.dtype) == ((2, 4, 4, 2, 5), (2, 4, 4, 2, 5), torch.bfloat16)
    assert (kv.num_pages, kv.page_size) == (3, 4)
    assert page_bytes(SPEC, 4, torch.bfloat16) == 2 * kv.k[:, 0].numel() * kv.k.element_size()


@pytest.mark.parametrize("norm", [True, False])
def test_moe_weighs_the_chosen_experts(norm: bool) -> None:
    tokens, hidden, width, experts, top_k = 7, 6, 4, 5, 2
    x, router = torch.randn(tokens, hidden), torch.randn(experts, hidden)
    gate_up, down = torch.randn(experts, 2 * width, hidden), torch.randn(experts, hidden, width)
    out = moe(x, router, gate_up, down, top_k, norm)
    for token in range(tokens):
        probs = (router @ x[token]).softmax(dim=-1)
        chosen = probs.argsort(descending=True)[:top_k].tolist()
        scale = float(probs[chosen].sum()) if norm else 1.0
        exact = sum(probs[e] / scale * (down[e] @ silu_mul(gate_up[e] @ x[token])) for e in chosen)
        assert torch.allclose(out[token], torch.as_tensor(exact), atol=1e-5)


def test_only_what_gains_is_packed() -> None:
    packed = pack(torch.randn(4, 4))
    assert isinstance(packed, torch.Tensor)
    assert packed.is_mkldnn
    weight = torch.randn(4, 4, dtype=torch.bfloat16)
    assert pack(weight) is weight


@pytest.mark.parametrize("rows", [1, 2, 9, 63, 64, 65, 79, 80, 81, 200])
def test_linear_is_the_matmul_for_any_number_of_rows_packed_or_not(rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(rows, 32)
    packed = pack(weight)
    for b in (None, bias):
        exact = (x.double() @ weight.double().T + (0 if b is None else b)).float()
        for out in (linear(x, packed, b), linear(x, weight, b)):
            assert out.shape == (rows, 48)
            torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-4)
