"""The norm kernels against `reference.rms_norm` and `reference.add_rms_norm`."""

from __future__ import annotations

import pytest
import torch

from minisgl.core import ops as reference
from minisgl.gpu.kernels import norm

SHAPES = [(1, 64), (3, 576), (5, 1000), (2, 5120), (1, 8192)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_norm_is_the_references(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(rows * dim)
    x = 3 * torch.randn(rows, dim, dtype=dtype, device=device)
    weight = torch.randn(dim, dtype=dtype, device=device)
    expected = reference.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6), expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_sum_is_rounded_into_the_stream_before_its_norm(
    rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(rows + dim)
    x, residual = torch.randn(2, rows, dim, dtype=dtype, device=device).unbind()
    weight = torch.randn(dim, dtype=dtype, device=device)
    stream = residual.clone()
    expected = reference.add_rms_norm(x, stream, weight, 1e-5)
    actual = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, stream)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=1e-6)


def test_narrow_rows_are_taken_several_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "FILLING_ROWS", 1)
    torch.manual_seed(0)
    x, weight = torch.randn(37, 96, device=device), torch.randn(96, device=device)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_rows_may_lie_apart(device: torch.device) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 64, device=device), torch.randn(64, device=device)
    torch.testing.assert_close(norm.rms_norm(x[:, 1], weight, 1e-6), reference.rms_norm(x[:, 1], weight, 1e-6))


def test_no_rows_give_no_rows(device: torch.device) -> None:
    assert norm.rms_norm(torch.empty(0, 64, device=device), torch.ones(64, device=device), 1e-6).shape == (0, 64)
