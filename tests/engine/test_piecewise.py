"""Steps in pieces: which numbers of tokens there are, and that padding changes nothing. Nothing is captured here."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.driver import CPU, Driver
from helpers.ranked import SPECS
from minisgl.core.weights import dummy_weights
from minisgl.gpu.cuda_graphs import PiecewiseGraphs, Work, piece_sizes


@pytest.mark.parametrize("largest", [1, 16, 100, 512, 1000, 1024, 2048, 2500])
def test_sizes_end_with_the_largest_and_waste_little(largest: int) -> None:
    sizes = piece_sizes(largest)
    assert sizes[-1] == largest
    assert sizes == sorted(set(sizes))
    assert all(above <= max(1.51 * (below + 1), below + 16) for below, above in itertools.pairwise(sizes))
    assert len(sizes) <= 25


def test_none_are_captured_for_no_tokens() -> None:
    assert piece_sizes(0) == []


class Anew:
    """Does again what a graph would replay, and counts it."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, work: Work) -> Work:
        def again() -> None:
            self.done += 1
            work()

        return again


@pytest.mark.parametrize("model", ["qwen3", "llama-biased", "qwen3-moe", "mistral"])
def test_steps_in_pieces_write_and_say_what_whole_ones_do(model: str) -> None:
    torch.set_num_threads(1)
    spec = SPECS[model]
    weights = dummy_weights(spec, torch.float32, CPU)
    whole, pieces = Driver(spec, weights), Driver(spec, weights)
    anew = Anew()
    pieces.runner.pieces = PiecewiseGraphs(pieces.decoder, pieces.runner.kv, 20, lambda: anew)
    tokens = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5, 0, 11, 13, 2, 2, 9, 30]
    said = [
        [
            driver.step(chunks={0: tokens, 1: tokens[:2]}),  # 19 of 20
            driver.step(decode=[0], chunks={2: tokens[:9]}, unfinished=[2]),  # 10 of 16, where 20 were
            driver.step(chunks={2: tokens[3:5]}, unfinished=[2]),  # nobody asks for a token
            driver.step(decode=[0, 1]),  # no prompts: not in pieces
            driver.step(decode=[1], chunks={2: tokens, 3: tokens[:5]}),  # 23, too many
            driver.step(decode=[0, 1, 2], chunks={3: tokens[6:]}),
        ]
        for driver in (whole, pieces)
    ]
    assert said[0] == said[1]
    assert anew.done == 4 * spec.num_layers
    for old, new in zip(whole.runner.kv.k[:, :-1], pieces.runner.kv.k[:, :-1], strict=True):
        torch.testing.assert_close(old, new)
        assert torch.equal(old == 0, new == 0)
