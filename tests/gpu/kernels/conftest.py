"""The dtypes of kernels' tests. The interpreter computes in numpy, which has no bfloat16."""

import pytest
import torch


@pytest.fixture(params=["float32", "float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that a model may have."""
    chosen: torch.dtype = getattr(torch, request.param)
    return chosen


@pytest.fixture(params=["float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def half(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = getattr(torch, request.param)
    return chosen
