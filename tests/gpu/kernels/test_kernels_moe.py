"""The grouped expert kernels against `reference.moe`."""

import pytest
import torch
from torch import Tensor

from helpers.gemm import error, in_blocks
from minisgl.core import ops as reference
from minisgl.core.quantization import BLOCK, Fp8Rows, quantize, quantize_fp8
from minisgl.gpu.kernels import moe as kernels

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("tokens", "dim", "width", "experts", "top_k"),
    [(1, 64, 32, 8, 2), (7, 96, 40, 12, 3), (40, 64, 48, 4, 4), (3, 128, 64, 16, 8), (5, 32, 16, 3, 1)],
)
def test_layer_is_the_references(
    tokens: int, dim: int, width: int, experts: int, top_k: int, normalise: bool, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    torch.manual_seed(tokens)
    x = torch.randn(tokens, dim, device=device).to(dtype)
    router = (torch.randn(experts, dim, device=device) / dim**0.5).to(dtype)
    gate_up = (torch.randn(experts, 2 * width, dim, device=device) / dim**0.5).to(dtype)
    down = (torch.randn(experts, dim, width, device=device) / width**0.5).to(dtype)
    layer = (x, router, gate_up, down, top_k, normalise)
    expected, actual = reference.moe(*layer), kernels.moe(*layer)
    assert float((actual - expected).float().norm()) <= TOLERANCE[dtype] * float(expected.float().norm())
    torch.testing.assert_close(actual, expected, rtol=10 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


FORMS = {"channel": quantize_fp8, "block": in_blocks}


@pytest.fixture
def exact_rows(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In the interpreter rows are quantised by the twin: its conversion to FP8 makes 64 of what rounds to 128."""

    def twin(x: Tensor, runs: bool) -> Fp8Rows:
        data, scale = quantize(x, BLOCK if runs else None)
        return Fp8Rows(data, scale.t().contiguous().t(), len(x), x.dtype)

    if device.type == "cpu":
        monkeypatch.setattr(kernels, "quantize_rows", twin)


@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tokens", "dim", "width", "experts", "top_k"),
    [
        (1, 64, 32, 8, 2),
        (7, 160, 40, 6, 3),
        (40, 256, 128, 4, 4),
        (9, 136, 192, 3, 2),
        pytest.param(3, 2048, 768, 128, 8, marks=pytest.mark.gpu),
        pytest.param(64, 2048, 384, 128, 8, marks=pytest.mark.gpu),
        pytest.param(1000, 1024, 768, 16, 4, marks=pytest.mark.gpu),
    ],
)
def test_experts_in_fp8_are_the_references(
    tokens: int, dim: int, width: int, experts: int, top_k: int, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, dim, device=device).to(dtype)
    router = (torch.randn(experts, dim, device=device) / dim**0.5).to(dtype)
    gate_up = FORMS[form](torch.randn(experts, 2 * width, dim, device=device) / dim**0.5)
    down = FORMS[form](torch.randn(experts, dim, width, device=device) / width**0.5)
    layer = (x, router, gate_up, down, top_k, True)
    # On a GPU a sum or quotient that rounds another way becomes another number in FP8.
    limit = TOLERANCE[dtype] if device.type == "cpu" else 3e-2
    assert error(kernels.moe(*layer), reference.moe(*layer).float()) < limit


@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", kernels.MOE_TILES, ids=lambda tile: str(tile.rows))
def test_every_tile_takes_experts_in_fp8_and_a_matrix_that_is_not(
    tile: kernels.MoeTile, form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOE_TILES", (tile,))
    torch.manual_seed(1)
    x, router = torch.randn(30, 300, device=device).half(), torch.randn(4, 300, device=device).half()
    gate_up, down = torch.randn(4, 288, 300, device=device) / 17, torch.randn(4, 300, 144, device=device) / 12
    for pair in ((FORMS[form](gate_up), FORMS[form](down)), (FORMS[form](gate_up), down.half())):
        layer = (x, router, *pair, 3, False)
        limit = TOLERANCE[torch.float16] if device.type == "cpu" else 3e-2
        assert error(kernels.moe(*layer), reference.moe(*layer).float()) < limit


def test_every_token_may_choose_the_same_experts(device: torch.device) -> None:
    torch.manual_seed(0)
    x, router = torch.rand(50, 32, device=device), torch.zeros(8, 32, device=device)
    router[:2] = 1.0  # x is positive, so these win everywhere
    layer = (x, router, torch.randn(8, 64, 32, device=device), torch.randn(8, 32, 32, device=device), 2, True)
    torch.testing.assert_close(kernels.moe(*layer), reference.moe(*layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile", kernels.MOE_TILES, ids=lambda tile: str(tile.rows))
def test_every_tile_gives_the_same_layer(
    tile: kernels.MoeTile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOE_TILES", (tile,))
    torch.manual_seed(1)
    x, router = torch.randn(30, 80, device=device), torch.randn(4, 80, device=device)
    layer = (x, router, torch.randn(4, 48, 80, device=device) / 9, torch.randn(4, 80, 24, device=device) / 5, 3, False)
    torch.testing.assert_close(kernels.moe(*layer), reference.moe(*layer), rtol=1e-4, atol=1e-5)


def test_tile_grows_with_the_experts_lists() -> None:
    rows = [kernels.moe_tile_for(8 * tokens, 128).rows for tokens in (1, 64, 170, 256, 512, 1024, 8192)]
    assert rows == [16, 16, 16, 32, 64, 128, 128]


def test_no_tokens_give_no_tokens(device: torch.device) -> None:
    x, router, gate_up, down = (torch.empty(s, device=device) for s in ((0, 16), (4, 16), (4, 16, 16), (4, 16, 8)))
    assert kernels.moe(x, router, gate_up, down, 2, True).shape == (0, 16)


def test_a_token_that_is_nan_changes_no_other(device: torch.device) -> None:
    torch.manual_seed(2)
    x, router = torch.randn(20, 32, device=device), torch.randn(8, 32, device=device)
    layer = (router, torch.randn(8, 64, 32, device=device), torch.randn(8, 32, 32, device=device), 3, True)
    expected = reference.moe(x, *layer)
    x[5:9] = torch.nan
    others = [row for row in range(20) if not 5 <= row < 9]
    torch.testing.assert_close(kernels.moe(x, *layer)[others], expected[others], rtol=1e-4, atol=1e-4)
