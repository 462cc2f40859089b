"""Penalties, masks and log-probabilities against loops over tokens."""

import numpy as np
import pytest
import torch

from minisgl.core.logits import forbid, penalise, token_scores


def seen(prompt: list[int], answer: list[int], vocab: int) -> list[int]:
    """What the tables hold of a row."""
    return [2 * answer.count(token) + (token in prompt) for token in range(vocab)]


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.5, -0.5]])
    held = torch.tensor([seen([0, 1, 1], [2, 3, 3, 0], 6)], dtype=torch.int32)
    out = penalise(logits.clone(), held, torch.tensor([2.0]), torch.tensor([0.25]), torch.tensor([1.0]))
    assert out.tolist() == [[1.0 - 0.25 - 1, -4.0, 1.5 - 0.25 - 1, -6.0 - 0.5 - 1, 0.5, -0.5]]


def test_neutral_penalties_change_no_bit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50) * 10
    logits[0, 3] = float("-inf")
    held = torch.randint(0, 100_000, (3, 50), dtype=torch.int32)
    rows = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3)
    out = penalise(logits.clone(), held, *rows)
    assert torch.equal(out[:2], logits[:2])
    assert not torch.equal(out[2], logits[2])


@pytest.mark.parametrize("vocab", [31, 32, 33, 64, 211])
def test_a_mask_forbids_exactly_the_tokens_whose_bit_is_zero(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    bits = rng.integers(0, 2, (4, -(-vocab // 32) * 32), np.uint8)
    masks = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    out = forbid(torch.ones(4, vocab), masks)
    assert torch.equal(out, torch.from_numpy(np.where(bits[:, :vocab] == 1, 1.0, -np.inf)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_log_softmax_and_the_highest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(6, 300) * 4).to(dtype)
    tokens = torch.tensor([0, 299, 5, 6, 7, 8])
    right = logits.double().log_softmax(dim=-1)
    scores = token_scores(logits, tokens, 7)
    assert torch.allclose(scores.logprobs.double(), right.gather(1, tokens[:, None])[:, 0], atol=1e-5)
    for row in range(6):
        order = sorted(range(300), key=lambda t: (-float(logits[row, t]), t))
        assert scores.top_ids[row].tolist() == order[:7]
    assert torch.allclose(scores.top_logprobs.double(), right.gather(1, scores.top_ids.long()), atol=1e-5)


def test_of_equally_probable_tokens_the_lowest_ids_are_named() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, ::2] = -0.0
    logits[0, 700] = 1.0
    assert token_scores(logits, torch.tensor([0]), 4).top_ids.tolist() == [[700, 0, 1, 2]]


def test_masked_logits_have_scores_too() -> None:
    for logits, top, ids in (([-1e38, float("-inf"), 3e38], 2, [2, 0]), ([0.0, 0.0], 0, []), ([0.0, 0.0], 20, [0, 1])):
        assert token_scores(torch.tensor([logits]), torch.tensor([1]), top).top_ids.tolist() == [ids]
