"""Compiling kernels without launching them."""

import pytest
import torch
import triton.language as tl

from minisgl.gpu.kernels.jit import compiling, jit


@jit
def _fill_kernel(out: tl.tensor, VALUE: tl.constexpr) -> None:
    tl.store(out + tl.program_id(0), VALUE)


@pytest.mark.gpu
def test_a_launch_within_the_block_only_compiles() -> None:
    out = torch.zeros(4, device="cuda")
    with compiling():
        for value in range(1, 5):
            _fill_kernel[(4,)](out, VALUE=value)
    assert out.tolist() == [0.0] * 4
    for value in range(1, 6):  # the last is compiled now
        _fill_kernel[(4,)](out, VALUE=value)
        assert out.tolist() == [value] * 4
