"""FP8 kernels against their twins, on a GPU: the interpreter has no FP8."""

import pytest
import torch

from helpers.gemm import error, matrices
from helpers.gpu import DEVICE
from minisgl.core.quantization import BLOCK, FP8_MAX, Fp8Weight, fp8_linear, quantize, quantize_weight
from minisgl.gpu.kernels import fp8
from minisgl.gpu.kernels.elementwise import add_rms_norm

pytestmark = pytest.mark.gpu


def in_blocks(weight: torch.Tensor) -> Fp8Weight:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    data = (blocks / scale[:, None, :, None]).reshape(rows, columns)
    return Fp8Weight(data.to(torch.float8_e4m3fn), scale)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1024), (7, 5120), (300, 17408), (3, 384)])
def test_rows_are_quantised_as_by_the_twin(rows: int, width: int, blocks: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, width, device=DEVICE) * torch.logspace(-6, 4, rows, device=DEVICE)[:, None]
    x[rows // 2] = 0.0 if rows > 1 else x[0]
    x = x.bfloat16()
    got, (data, scale) = fp8.quantize_rows(x, blocks), quantize(x, BLOCK if blocks else None)
    torch.testing.assert_close(got.scale[:rows], scale, rtol=1e-6, atol=0.0)
    found = got.data[:rows].float()
    assert (found != data.float()).float().mean() < 1e-3  # a quotient that rounds another way
    torch.testing.assert_close(found, data.float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["channel", "block"])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 65, 130, 512])
@pytest.mark.parametrize(("columns", "inner"), [(4096, 1024), (1024, 3072), (7168, 5120), (384, 640), (1000, 520)])
def test_linear_is_the_twins(rows: int, columns: int, inner: int, form: str, bias: bool) -> None:
    if form == "block" and (columns % BLOCK or inner % BLOCK):
        pytest.skip("no whole blocks")
    x, exact, offset = matrices(rows, columns, inner, torch.bfloat16, DEVICE)
    weight = in_blocks(exact) if form == "block" else quantize_weight(exact)
    added = offset if bias else None
    wanted = fp8_linear(x.float(), weight, None if added is None else added.float())
    assert error(fp8.linear(x, weight, added), wanted) < 5e-3


@pytest.mark.parametrize("rows", [1, 16, 40, 64])
def test_splits_are_added_up_by_the_norm(rows: int) -> None:
    x, exact, gain = matrices(rows, 1024, 3072, torch.bfloat16, DEVICE)
    weight = quantize_weight(exact)
    splits = fp8.linear(x, weight, None, split=True)
    assert splits.shape == (4, rows, 1024)
    residual = torch.zeros(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    add_rms_norm(splits, residual, gain, 1e-6)
    assert error(residual, fp8_linear(x.float(), weight)) < 5e-3
