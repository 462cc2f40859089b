"""Tests marked `gpu` are skipped without a CUDA GPU, and give their memory back."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    needed = request.node.get_closest_marker("gpu") is not None
    if needed and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    yield
    if needed:
        torch.cuda.empty_cache()
