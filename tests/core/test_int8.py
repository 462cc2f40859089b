"""`--quantization int8`: weights in int8 on the CPU, against exact arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.driver import CPU
from helpers.tiny_models import MOE, SIZES, random_model
from minisgl.config import Config, Machine, resolve
from minisgl.core import quantization
from minisgl.core.decoder import pack_weights
from minisgl.core.model_config import read_spec
from minisgl.core.ops import linear, pack
from minisgl.core.quantization import Fp8Weight, Int8Weight, quantize_fp8, quantize_int8
from minisgl.core.weights import load_weights
from minisgl.errors import ConfigError

needs_vnni = pytest.mark.skipif(not quantization.has_vnni(), reason="this CPU has no VNNI")


def made(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What a weight is in int8, in float64; rounded as float32, in which some values lie half way."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().double() * scale.double()


@needs_vnni
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (17, 33), (576, 576), (64, 1536), (960, 127)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_weight(rows: int, n: int, k: int, bias: bool) -> None:
    weight, x, added = made(n, k), made(rows, k, 1), made(1, n, 2)[0] if bias else None
    x *= torch.logspace(-20, 20, rows)[:, None]  # rows of any size beside one another
    expected = x.double() @ rounded(weight).t() + (0 if added is None else added.double())
    # A row is rounded to 1 / 32512 of its largest value, and the scales are float32.
    room = 2e-5 * (x.double().abs().amax(1, keepdim=True) * rounded(weight).abs().sum(1)) + 1e-5 * expected.abs()
    result = linear(x, quantize_int8(weight), added)
    assert ((result.double() - expected).abs() <= room + 1e-6).all()
    assert result.dtype == x.dtype


@needs_vnni
def test_a_row_does_not_depend_on_the_others() -> None:
    weight, x = quantize_int8(made(96, 200)), made(100, 200, 1)
    x[1::2] *= 1e6
    together = linear(x, weight)
    for row in (0, 1, 50, 99):
        assert torch.equal(linear(x[row : row + 1], weight)[0], together[row])


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes(dtype: torch.dtype) -> None:
    weight = made(8, 64)
    weight[3] = 0
    packed = quantize_int8(weight.to(dtype))
    x = made(5, 64, 1).to(dtype)
    x[1], x[2, 7], x[3, 7] = 0, torch.nan, torch.inf
    result = linear(x, packed)
    assert (result[1] == 0).all()
    assert not result[2:4].isfinite().any()
    assert result[[0, 4]].isfinite().all()
    assert (result[[0, 4], 3] == 0).all()


@needs_vnni
def test_every_dense_matrix_and_the_head_are_in_int8_and_the_embedding_is_not(tmp_path: Path) -> None:
    config: dict[str, Any] = {**SIZES, **MOE}
    random_model("Qwen3Moe", **config).save_pretrained(tmp_path)
    weights = load_weights(tmp_path, read_spec(tmp_path), torch.float32, CPU, quantize=quantize_int8)
    pack_weights(weights, int8=True)
    sparse, dense = weights.layers
    for weight in (sparse.qkv, sparse.o, dense.qkv, dense.gate_up, dense.down, weights.head):
        assert isinstance(weight, Int8Weight)
    assert isinstance(sparse.expert_gate_up, torch.Tensor)
    assert isinstance(sparse.expert_down, torch.Tensor)
    assert weights.embedding.dtype == torch.float32
    assert weights.head.shape == weights.embedding.shape


@needs_vnni
def test_a_weight_in_fp8_becomes_int8() -> None:
    stored = quantize_fp8(made(32, 64))
    packed = pack(stored, int8=True)
    assert isinstance(stored, Fp8Weight)
    assert isinstance(packed, Int8Weight)
    x = made(3, 64, 1)
    exact = x @ stored.dequantize(torch.float32).t()
    assert (linear(x, packed) - exact).norm() / exact.norm() < 0.02


def test_a_gpu_refuses_int8_by_name() -> None:
    gpu = Machine(True, "H200", 140 << 30)
    with pytest.raises(ConfigError, match="--quantization int8 is for the CPU; on a GPU give fp8"):
        resolve(Config(quantization="int8"), gpu)
    assert resolve(Config(quantization="int8", device="cpu"), gpu).config.quantization == "int8"


def test_a_cpu_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    with pytest.raises(ConfigError, match=r"--quantization int8 needs .* x86 CPU with VNNI"):
        quantize_int8(made(4, 4))
