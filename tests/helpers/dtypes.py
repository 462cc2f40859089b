"""Dtypes for kernel tests that take seconds under the interpreter, where one is enough for them."""

from __future__ import annotations

from typing import Final

import pytest
import torch

SLOW_DTYPES: Final = (
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
)
"""For `parametrize("dtype", SLOW_DTYPES)`, which goes before the fixture of that name."""
