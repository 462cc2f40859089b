"""The SwiGLU kernel against `reference.silu_mul`."""

from __future__ import annotations

import pytest
import torch

from minisgl.core import ops as reference
from minisgl.gpu.kernels.activation import silu_mul

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 768), (2, 1536), (5, 1000), (0, 64)])
def test_activation_is_the_references(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(width)
    gate_up = 4 * torch.randn(rows, 2 * width, dtype=dtype, device=device)
    torch.testing.assert_close(silu_mul(gate_up), reference.silu_mul(gate_up), rtol=TOLERANCE[dtype], atol=1e-6)
