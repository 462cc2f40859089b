"""Products for few rows against torch's, parts of sums through the norm that adds them up."""

from __future__ import annotations

import pytest
import torch

from helpers.products import error, matrices
from minisgl.core import ops as reference
from minisgl.gpu.kernels import linear, norm


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_product(rows: int, bias: bool, half: torch.dtype, device: torch.device) -> None:
    x, weight, offset = matrices(rows, 128, 512, half, device)
    got = linear.linear(x, weight, offset if bias else None)
    wanted = x.float() @ weight.float().T + (offset.float() if bias else 0.0)
    assert got.dtype == half
    assert error(got, wanted) < 5e-3


@pytest.mark.parametrize("rows", [1, 40])
def test_gated_linear_is_the_activation_of_the_product(rows: int, half: torch.dtype, device: torch.device) -> None:
    x, weight, _ = matrices(rows, 256, 512, half, device)
    wanted = reference.silu_mul(x.float() @ weight.float().T)
    assert error(linear.gated_linear(x, weight), wanted) < 5e-3


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("inner", [512, 1536])
def test_the_norm_adds_up_the_parts_of_a_product(
    rows: int, inner: int, half: torch.dtype, device: torch.device
) -> None:
    x, weight, gain = matrices(rows, 128, inner, half, device)
    stream = torch.randn(rows, 128, device=device).to(half)
    wanted_stream = stream.clone()
    product = (x.float() @ weight.float().T).to(half)
    wanted = reference.add_rms_norm(product, wanted_stream, gain, 1e-6)
    parts = linear.linear_parts(x, weight)
    assert parts.shape == (linear.PARTS.parts, rows, 128)
    got = norm.add_rms_norm(parts, stream, gain, 1e-6)
    assert error(stream, wanted_stream.float()) < 2e-3
    assert error(got, wanted.float()) < 5e-3


def test_only_few_rows_and_small_matrices_fit() -> None:
    x, weight, _ = matrices(64, 128, 512, torch.float16, torch.device("cpu"))
    assert linear.fits(x, weight, 64)
    assert not linear.fits(x, weight, 63)
    assert not linear.fits(x.float(), weight, 64)
    assert not linear.fits(x, weight[:100], 64)
    assert not linear.fits(x, torch.empty(16384, 1024, dtype=torch.float16), 64)
