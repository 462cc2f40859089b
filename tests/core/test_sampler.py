"""Sampling: the filters' sets exactly, the noise and the sampled tokens by chi-square at a fixed seed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.sampling_rows import sampling_rows
from minisgl.core import sampler as sampling
from minisgl.core.sampler import gumbel_noise, mask_stop_ids, sample, threshold, token_hash


def assert_frequencies(values: Tensor, expected: Tensor) -> None:
    """Chi-square: values 0 … n - 1 are as frequent as expected (n,), within 4 standard deviations of the statistic."""
    counts, degrees = torch.bincount(values, minlength=len(expected)), len(expected) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def kept(logits: list[float], **params: Any) -> list[int]:
    """Ids that the filters keep."""
    scaled = torch.tensor([logits]) - max(logits)
    return torch.nonzero(scaled[0] >= threshold(scaled, sampling_rows(1, **params))[0]).squeeze(1).tolist()


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]  # by probability: 1, 3, 4, 0, 2


@pytest.mark.parametrize(
    ("params", "ids"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 4]),
        ({"top_p": 0.97}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # 0.4 and 0.25 are 0.76 of the three's 0.85
        ({"top_k": 3, "top_p": 0.8}, [1, 3, 4]),
        ({"top_k": 4, "min_p": 0.55}, [1, 3]),
        ({"top_p": 0.6, "min_p": 0.9}, [1]),
    ],
)
@pytest.mark.parametrize("few", [(), (2,), (1, 3)])
def test_filters_keep(
    params: dict[str, Any], ids: list[int], few: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "FEW", few)
    assert kept(LOGITS, **params) == ids
    assert kept([0.0, 1.0, 0.0, 0.0, -1.0], top_k=2) == [0, 1, 2, 3]  # ties with the last token kept are kept


def test_looking_at_a_few_logits_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scaled = torch.cat([torch.randn(8, 500) * s for s in (0.1, 1.0, 5.0)])
    scaled -= scaled.amax(dim=-1, keepdim=True)
    params = sampling_rows(24, top_p=[1.0, 0.9, 0.5, 0.99], top_k=[0, 0, 200, 20, 499, 600], min_p=[0.0, 0.01, 0.2])
    outcomes = []
    for few in ((), (16, 100)):
        monkeypatch.setattr(sampling, "FEW", few)
        one_by_one = [threshold(scaled[i : i + 1], params.select(torch.tensor([i]))) for i in range(24)]
        outcomes += [scaled >= threshold(scaled, params), scaled >= torch.cat(one_by_one)]
    assert all(torch.equal(outcomes[0], outcome) for outcome in outcomes[1:])


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], *[[0.0, 3.0, 3.0]] * 8])
    params = sampling_rows(10, temperature=[0.0] * 2 + [5.0] * 8, top_k=[0] * 2 + [1] * 8)
    tokens = sample(logits, params, torch.zeros(10, dtype=torch.int32))
    assert tokens.tolist() == [1, 0, *[1] * 8]


def test_stop_ids_wait_for_the_minimum_length() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0]] * 3)
    params = sampling_rows(3, temperature=0.0, min_len=[6, 5, 6], stop_ids=[[1, 2], [1, 2], [1, -1]])
    position = torch.tensor([5, 5, 5], dtype=torch.int32)
    assert sample(logits, params, position).tolist() == [3, 1, 2]
    assert mask_stop_ids(logits, params, position)[0].tolist() == [0.0, -math.inf, -math.inf, 1.0]
    assert logits[0].tolist() == [0.0, 9.0, 5.0, 1.0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-5])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    logits = torch.randn(4, 50) * 100
    params = sampling_rows(4, temperature=temperature, top_p=0.9)
    assert sample(logits, params, torch.arange(4, dtype=torch.int32)).tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.05, 0.6, 1.0, 1.7])
def test_sampled_frequencies_are_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    draws, vocab = 20000, 24
    logits = torch.randn(vocab) * (0.05 if temperature == 0.05 else 1.0)
    positions = torch.arange(draws, dtype=torch.int32)
    params = sampling_rows(draws, temperature=temperature, seed=11)
    tokens = sample(logits.expand(draws, -1), params, positions)
    assert_frequencies(tokens, draws * (logits / temperature).softmax(dim=-1))


def test_sampled_frequencies_after_a_filter_are_the_renormalised_softmax() -> None:
    draws = 20000
    logits = torch.tensor(LOGITS).expand(draws, -1)
    tokens = sample(logits, sampling_rows(draws, top_p=0.66), torch.full((draws,), 3, dtype=torch.int32))
    assert set(tokens.tolist()) == {1, 3, 4}
    assert_frequencies(
        torch.searchsorted(torch.tensor([1, 3, 4]), tokens), draws * torch.tensor([0.4, 0.25, 0.2]) / 0.85
    )


def test_a_row_samples_the_same_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 300)
    params = sampling_rows(9, temperature=[0.0, 0.7, 1.0], top_p=[0.9, 1.0, 0.8], top_k=[0, 30, 5])
    positions = torch.arange(9, dtype=torch.int32) * 5
    together = sample(logits, params, positions).tolist()
    for row in range(9):
        one = torch.tensor([row])
        assert sample(logits[one], params.select(one), positions[one]).tolist() == [together[row]]


def hash_of(seeds: list[int], positions: list[int], vocab: int) -> Tensor:
    tokens = torch.arange(vocab, dtype=torch.int32)
    return token_hash(torch.tensor(seeds), torch.tensor(positions, dtype=torch.int32), tokens).long() & 0xFFFFFFFF


def test_hash_is_what_its_definition_says() -> None:
    """The same in Python's integers; the values hold the definition still for every later kernel."""

    def mix(x: int, bits: int, *steps: tuple[int, int], last: int) -> int:
        for shift, factor in steps:
            x = (x ^ x >> shift) * factor & (2**bits - 1)
        return x ^ x >> last

    def mix32(x: int) -> int:
        return mix(x, 32, (16, 0x85EBCA6B), (13, 0xC2B2AE35), last=16)

    cases = [(0, 0), (1, 0), (-1, 7), (2**63 - 1, 131071), (-(2**63), 1), (123456789, 2**31 - 1)]
    ours = hash_of([seed for seed, _ in cases], [position for _, position in cases], 1000)
    for i, (seed, position) in enumerate(cases):
        key = (seed + (position + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        key = mix(key, 64, (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), last=31)
        expected = [mix32(mix32(token ^ key & 0xFFFFFFFF) ^ key >> 32) for token in range(1000)]
        assert ours[i].tolist() == expected
    assert hash_of([42], [3], 3)[0].tolist() == [2082550579, 2848127864, 2946389577]


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds"])
def test_the_hash_is_uniform_and_neighbours_are_independent(axis: str) -> None:
    """All values of each byte, and of two neighbours' high nibbles, are equally frequent; bits agree by chance."""
    n = 400
    base = hash_of([s for s in range(n) for _ in (0, 1)], [0, 1] * n, 201).view(n, 2, 201)
    pairs = {
        "tokens": (base[:, 0, :-1], base[:, 0, 1:]),
        "positions": (base[:, 0], base[:, 1]),
        "seeds": (base[:-1, 0], base[1:, 0]),
    }
    first, second = pairs[axis]
    joint = (first >> 28) * 16 + (second >> 28)
    for values in (joint, *(first >> shift & 255 for shift in (0, 8, 16, 24))):
        assert_frequencies(values.flatten(), torch.full((256,), values.numel() / 256))
    differing = np.bitwise_count((first ^ second).numpy()).mean()
    assert abs(differing - 16) < 4 * math.sqrt(8 / first.numel())


def test_noise_is_gumbel_and_finite() -> None:
    noise = gumbel_noise(torch.arange(100), torch.arange(100, dtype=torch.int32), 5000)
    assert bool(noise.isfinite().all())
    assert abs(float(noise.double().mean()) - 0.5772157) < 0.01
    assert abs(float(noise.double().var()) - math.pi**2 / 6) < 0.02
    assert float((noise < 0).double().mean()) == pytest.approx(math.exp(-1), abs=0.003)
