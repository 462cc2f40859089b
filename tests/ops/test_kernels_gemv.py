"""A large weight by one row, against torch's product."""

from __future__ import annotations

import pytest
import torch

from helpers.products import error, matrices
from minisgl.core import ops as reference
from minisgl.gpu.kernels import gemv
from minisgl.gpu.kernels.gemv import Cut


@pytest.mark.parametrize("inner", [256, 512, 1024, 1280])
@pytest.mark.parametrize("cut", [Cut(1, 512, 1), Cut(8, 512, 4), Cut(2, 1024, 2)])
def test_it_is_the_product_wherever_the_rows_end(inner: int, cut: Cut, half: torch.dtype, device: torch.device) -> None:
    x, weight, _ = matrices(1, 32, inner, half, device)
    wanted = x.float() @ weight.float().T
    out = torch.full((1, 32), 7.0, dtype=half, device=device)
    assert gemv.gemv(x, weight, out, cut) is out
    assert error(out, wanted) < 5e-3
    assert torch.equal(gemv.gemv(x, weight, cut=cut), out)


@pytest.mark.parametrize("inner", [512, 768])
def test_gated_it_is_the_activation_of_the_product(inner: int, half: torch.dtype, device: torch.device) -> None:
    x, weight, _ = matrices(1, 64, inner, half, device)
    wanted = reference.silu_mul(x.float() @ weight.float().T)
    for cut in (Cut(1, 512, 1), Cut(2, 256, 2)):
        assert error(gemv.gated_gemv(x, weight, cut), wanted) < 5e-3


def test_only_one_row_and_large_matrices_fit() -> None:
    weight = torch.empty(7168, 5120, dtype=torch.bfloat16, device="meta")
    one, two = (torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta") for rows in (1, 2))
    assert gemv.fits(one, weight)
    assert not gemv.fits(two, weight)
    assert not gemv.fits(one.float(), weight.float())
    assert not gemv.fits(one, weight[:1024])
    assert not gemv.fits(one[:, :5000].contiguous(), weight[:, :5000].contiguous())
    assert not gemv.fits(one[:, :2560].contiguous(), weight[:, :2560])
    assert not gemv.fits(one, torch.empty(151936, 5120, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("inner", [512, 2048, 5120, 17408])
def test_every_cut_takes_all_columns_that_fit(inner: int) -> None:
    assert 16 % gemv.gemv_cut(inner, gated=False).columns == 0
    assert 8 % gemv.gemv_cut(inner, gated=True).columns == 0
