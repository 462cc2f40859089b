"""What every test of the engine on the card needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    """Skip without a card; give back a test's memory after it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    yield
    torch.cuda.empty_cache()
