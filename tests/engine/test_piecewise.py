"""Numbers of tokens that pieces are captured for."""

from __future__ import annotations

import itertools

import pytest

from minisgl.engine.piecewise import piece_sizes


@pytest.mark.parametrize("largest", [1, 16, 100, 512, 1000, 1024, 2048, 2500])
def test_sizes_end_with_the_largest_and_waste_little(largest: int) -> None:
    sizes = piece_sizes(largest)
    assert sizes[-1] == largest
    assert sizes == sorted(set(sizes))
    assert all(above <= max(1.51 * (below + 1), below + 16) for below, above in itertools.pairwise(sizes))
    assert len(sizes) <= 25


def test_none_are_captured_for_no_tokens() -> None:
    assert piece_sizes(0) == []
