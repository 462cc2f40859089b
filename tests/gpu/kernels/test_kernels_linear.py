"""GEMMs for few rows against torch's; split-K sums through the norm that adds them up."""

import pytest
import torch

from helpers.gemm import error, matrices
from minisgl.core import ops as reference
from minisgl.gpu.kernels import linear
from minisgl.gpu.kernels.elementwise import add_rms_norm
from minisgl.gpu.kernels.linear import GemvTile


@pytest.mark.parametrize(("rows", "bias"), [(1, True), (16, False), (17, True), (64, False)])
def test_linear_is_the_gemm_and_its_activation(rows: int, bias: bool, half: torch.dtype, device: torch.device) -> None:
    x, weight, offset = matrices(rows, 256, 512, half, device)
    got, wanted = linear.linear(x, weight, offset if bias else None), x.float() @ weight.float().T
    assert got.dtype == half
    assert error(got, wanted + (offset.float() if bias else 0.0)) < 5e-3
    assert error(linear.linear(x, weight, gated=True), reference.silu_mul(wanted)) < 5e-3


@pytest.mark.parametrize(("rows", "inner"), [(1, 1536), (33, 512)])
def test_the_norm_adds_up_the_splits_of_a_gemm(rows: int, inner: int, half: torch.dtype, device: torch.device) -> None:
    x, weight, gain = matrices(rows, 128, inner, half, device)
    residual = torch.randn(rows, 128, device=device).to(half)
    wanted_residual = residual.clone()
    gemm = (x.float() @ weight.float().T).to(half)
    wanted = reference.add_rms_norm(gemm, wanted_residual, gain, 1e-6)
    splits = linear.split_k_linear(x, weight)
    assert splits.shape == (linear.SPLIT_K.splits, rows, 128)
    got = add_rms_norm(splits, residual, gain, 1e-6)
    assert error(residual, wanted_residual.float()) < 2e-3
    assert error(got, wanted.float()) < 5e-3


def test_only_few_rows_and_small_matrices_fit() -> None:
    x, weight, _ = matrices(64, 128, 512, torch.float16, torch.device("cpu"))
    assert linear.fits_linear(x, weight, 64)
    assert not linear.fits_linear(x, weight, 63)
    large = torch.empty(16384, 1024, dtype=torch.float16)
    for other, matrix in ((x.float(), weight), (x, weight[:100]), (x, large)):
        assert not linear.fits_linear(other, matrix, 64)


@pytest.mark.parametrize("inner", [256, 512, 768, 1024, 1280])
def test_gemv_is_the_gemm_wherever_the_rows_end(inner: int, half: torch.dtype, device: torch.device) -> None:
    x, weight, _ = matrices(1, 64, inner, half, device)
    wanted = x.float() @ weight.float().T
    for tile in (GemvTile(1, 512, 1), GemvTile(8, 512, 4), GemvTile(2, 1024, 2)):
        assert error(linear.gemv(x, weight, tile=tile), wanted) < 5e-3
    for tile in (GemvTile(1, 512, 1), GemvTile(2, 256, 2)) if inner in (512, 768) else ():
        assert error(linear.gemv(x, weight, gated=True, tile=tile), reference.silu_mul(wanted)) < 5e-3


def test_only_one_row_and_large_matrices_fit_gemv() -> None:
    weight = torch.empty(7168, 5120, dtype=torch.bfloat16, device="meta")
    one, two = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (1, 2))
    vocabulary = torch.empty(151936, 5120, dtype=torch.bfloat16, device="meta")
    assert linear.fits_gemv(one, weight)
    for x, matrix in ((two, weight), (one.float(), weight.float()), (one, weight[:1024]), (one, vocabulary)):
        assert not linear.fits_gemv(x, matrix)
    assert not linear.fits_gemv(one[:, :5000].contiguous(), weight[:, :5000].contiguous())
    assert not linear.fits_gemv(one[:, :2560].contiguous(), weight[:, :2560])


@pytest.mark.parametrize("inner", [512, 2048, 5120, 17408])
def test_every_gemv_tile_divides_all_columns_that_fit(inner: int) -> None:
    assert 16 % linear.gemv_tile_for(inner, gated=False).columns == 0
    assert 8 % linear.gemv_tile_for(inner, gated=True).columns == 0
