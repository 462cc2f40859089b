"""The sampling kernels against `core.sampler.sample`: the same hash, the same noise, the same tokens."""

from typing import Any
from unittest import mock

import pytest
import torch
import triton.language as tl
from torch import Tensor

from helpers.sampling_rows import SLOW_DTYPES, sampling_rows
from minisgl.core.sampler import SamplingRows, gumbel_noise
from minisgl.core.sampler import sample as reference_sample
from minisgl.core.sampler import token_hash as reference_hash
from minisgl.gpu.kernels import sampling
from minisgl.gpu.kernels.jit import jit
from minisgl.gpu.kernels.sampling import exponential, row_keys, token_hash, uniform

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789]


@jit
def _noise_kernel(
    seeds: tl.tensor, positions: tl.tensor, bits: tl.tensor, noise: tl.tensor, vocab: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0)
    tokens = tl.arange(0, BLOCK)
    keys = row_keys(tl.load(seeds + row), tl.load(positions + row))
    hashed = token_hash(keys, tokens).to(tl.int32, bitcast=True)
    tl.store(bits + row * vocab + tokens, hashed, mask=tokens < vocab)
    tl.store(noise + row * vocab + tokens, -tl.log(exponential(uniform(keys, tokens))), mask=tokens < vocab)


def check(logits: Tensor, rows: SamplingRows, split: int = sampling.SPLIT) -> Tensor:
    """Sample a token for each row of the table by kernel and by reference, and return them."""
    slots = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    positions = 10 + 3 * slots
    with mock.patch.object(sampling, "SPLIT", split):
        tokens = sampling.sample(logits, rows, slots, positions)
    assert torch.equal(tokens, reference_sample(logits, rows, positions))
    return tokens


def test_hash_is_the_references_bit_for_bit_and_noise_to_rounding(device: torch.device) -> None:
    vocab = 20000
    seeds = torch.tensor(SEEDS, device=device)
    positions = torch.tensor([0, 1, 2, 131071, 2**31 - 2, 77], dtype=torch.int32, device=device)
    bits, noise = (torch.empty(len(SEEDS), vocab, dtype=t, device=device) for t in (torch.int32, torch.float32))
    _noise_kernel[(len(SEEDS),)](seeds, positions, bits, noise, vocab, BLOCK=32768)
    tokens = torch.arange(vocab, dtype=torch.int32, device=device)
    assert torch.equal(bits, reference_hash(seeds, positions, tokens))
    torch.testing.assert_close(noise, gumbel_noise(seeds, positions, vocab), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [128, 1024])
@pytest.mark.parametrize("vocab", [40, 1003])
def test_tokens_without_a_filter_are_the_references(
    vocab: int, split: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(vocab)
    logits = (3 * torch.randn(10, vocab, device=device)).to(dtype)
    check(logits, sampling_rows(10, device, temperature=[0.0, 0.6, 1.0, 5.0, 100.0]), split)


FILTERS: list[dict[str, float]] = [
    {"top_k": 1}, {"top_k": 2}, {"top_k": 20, "top_p": 0.95}, {"top_k": 50, "top_p": 0.3}, {"top_k": 500, "top_p": 0.9},
    {"top_k": 10**6}, {"top_p": 0.05}, {"top_p": 0.9}, {"top_p": 0.9999}, {"min_p": 0.1}, {"min_p": 1.0},
    {"min_p": 0.02, "top_p": 0.8, "top_k": 40},
]  # fmt: skip
"""Each is the filter of one row of a batch."""


def filter_columns() -> dict[str, list[float]]:
    off = {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    return {name: [filters.get(name, default) for filters in FILTERS] for name, default in off.items()}


@pytest.mark.parametrize("dtype", SLOW_DTYPES)
@pytest.mark.parametrize(("split", "spread"), [(128, 1.0), (1024, 6.0)])
def test_filtered_tokens_are_the_references(
    split: int, spread: float, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(5)
    logits = (spread * torch.randn(len(FILTERS), 703, device=device)).to(dtype)
    tokens = check(logits, sampling_rows(len(FILTERS), device, temperature=[0.8, 1.3], **filter_columns()), split)
    assert int(tokens[0]) == int(logits[0].argmax())


@pytest.mark.parametrize(
    "filters", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 30, "top_p": 0.7}, {"min_p": 0.5}], ids=str
)
def test_tokens_as_probable_as_the_last_kept_are_kept(filters: dict[str, Any], device: torch.device) -> None:
    torch.manual_seed(6)
    logits = torch.randint(-4, 4, (6, 300), device=device).half()  # about 37 tokens share each value
    tokens = check(logits, sampling_rows(6, device, **filters))
    assert len(set(tokens.tolist())) > 4


@pytest.mark.parametrize("dtype", SLOW_DTYPES)
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_the_last_token_kept_is_kept_below_zero_too(
    filters: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    logits = torch.tensor([-1.0, -1.125, -3.0], device=device).to(dtype).repeat(8, 1)
    tokens = check(logits, sampling_rows(8, device, **filters))
    assert set(tokens.tolist()) == {0, 1}


def test_of_equal_logits_greedy_takes_the_lowest_id(device: torch.device) -> None:
    logits = torch.zeros(2, 300, device=device)
    logits[0, [70, 71, 290]] = 1.0
    assert check(logits, sampling_rows(2, device, temperature=0.0), split=64).tolist() == [70, 0]


def test_flat_distribution_widens_the_search_for_top_p(device: torch.device) -> None:
    torch.manual_seed(7)
    logits = 0.3 * torch.randn(2, 9000, device=device)
    check(logits, sampling_rows(2, device, top_p=[0.999, 0.5]))


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.01}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_wait_for_the_shortest_length(
    temperature: float, filters: dict[str, Any], device: torch.device
) -> None:
    torch.manual_seed(8)
    logits = torch.randn(4, 500, device=device)
    logits[:, [3, 200]] = 20.0
    stops = [[3, 200, -1]] * 4
    rows = sampling_rows(4, device, temperature=temperature, min_len=[0, 1000], stop_ids=stops, **filters)
    tokens = check(logits, rows, split=128).tolist()
    assert all(token in (3, 200) for token in tokens[::2])
    assert all(token not in (3, 200) for token in tokens[1::2])


def test_a_whole_split_of_masked_tokens_never_wins(device: torch.device) -> None:
    torch.manual_seed(9)
    logits = torch.randn(4, 200, device=device)
    logits[:, 64:128] = float("-inf")
    check(logits, sampling_rows(4, device, top_p=[1.0, 0.9]), split=64)
    logits[:, :64] = float("-inf")
    assert int(check(logits, sampling_rows(4, device, temperature=[0.0, 2.0]), split=64).min()) >= 128


@pytest.mark.filterwarnings("ignore:overflow")  # the bound is the least float32: over T it is -inf, and its share 0
@pytest.mark.parametrize("dtype", SLOW_DTYPES)
@pytest.mark.parametrize("allowed", [1, 2, 9])
def test_of_a_vocabulary_masked_but_for_a_few_only_those_are_sampled(
    allowed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """As a grammar leaves it: whole segments and splits of -inf, fewer tokens than top_k."""
    torch.manual_seed(12)
    logits = (3 * torch.randn(len(FILTERS), 703, device=device)).to(dtype)
    few = torch.randperm(703, device=device)[:allowed]
    masked = torch.full_like(logits, float("-inf"))
    masked[:, few] = logits[:, few]
    rows = sampling_rows(len(FILTERS), device, temperature=[0.8, 0.0, 3.0, 1.3], **filter_columns())
    tokens = check(masked, rows, split=128)
    assert set(tokens.tolist()) <= set(few.tolist())


def test_tiny_temperature_is_nearly_greedy(device: torch.device) -> None:
    torch.manual_seed(10)
    logits = torch.randn(4, 3000, device=device)
    tokens = check(logits, sampling_rows(4, device, temperature=[1e-40, 1e-8, 1e-4], top_p=[1.0, 0.9]))
    assert torch.equal(tokens, logits.argmax(dim=-1).to(torch.int32))


def test_rows_take_their_parameters_by_slot_and_ignore_their_batch(device: torch.device) -> None:
    torch.manual_seed(11)
    logits = torch.randn(5, 700, device=device).half()
    rows = sampling_rows(9, device, temperature=[0.5, 0, 2], top_k=[0, 0, 7, 30], top_p=[0.8, 1], min_p=[0, 0, 0, 0.1])
    slots = torch.tensor([8, 2, 5, 0, 7], dtype=torch.int32, device=device)
    positions = torch.tensor([4, 900, 33, 1, 70], dtype=torch.int32, device=device)
    together = sampling.sample(logits, rows, slots, positions)
    assert torch.equal(together, reference_sample(logits, rows.select(slots.long()), positions))
    alone = [sampling.sample(logits[i : i + 1], rows, slots[i : i + 1], positions[i : i + 1]) for i in range(5)]
    assert torch.equal(torch.cat(alone), together)


def test_no_rows_give_no_tokens(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert sampling.sample(torch.empty(0, 100, device=device), sampling_rows(1, device), none, none).shape == (0,)
