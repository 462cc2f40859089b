"""Steps with prompts as graphs between their attentions: the same bits, in the same places, as launch by launch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.driver import Driver
from helpers.gpu import SPEC, gpu_config, graph_driver, random_prompts, random_weights, require
from minisgl.core.model_config import ModelSpec, Moe

pytestmark = pytest.mark.gpu

EXPERTS = Moe(num_experts=8, top_k=2, width=256, norm_topk_prob=True, layers=(True, True))
SPECS = {"qwen3": SPEC, "qwen3-moe": dataclasses.replace(SPEC, moe=EXPERTS)}


def pair_of_drivers(spec: ModelSpec, largest: int, attn: str) -> list[Driver]:
    """The same model launch by launch, and with pieces of up to `largest` tokens."""
    require(attn)
    weights = random_weights(spec, torch.bfloat16)
    configs = [gpu_config(attn=attn, piecewise_cuda_graph_max_tokens=tokens) for tokens in (0, largest)]
    return [graph_driver(spec, weights, config, 512) for config in configs]


def cached(driver: Driver) -> list[torch.Tensor]:
    """Keys and values outside the scratch page."""
    return [driver.runner.kv.k[:, :-1], driver.runner.kv.v[:, :-1]]


@pytest.mark.parametrize("model", list(SPECS))
@pytest.mark.parametrize("attn", ["auto", "fa", "fi", "triton"])
def test_steps_of_a_captured_size_are_the_same_to_the_bit(model: str, attn: str) -> None:
    first, second, third = random_prompts([40, 24, 30], seed=1)
    said = []
    drivers = pair_of_drivers(SPECS[model], 64, attn)
    for driver in drivers:
        tokens = driver.step(chunks={0: first, 1: second})  # 64
        tokens += driver.step(decode=[0, 1], chunks={2: third})  # 32
        tokens += driver.step(chunks={3: third[:16]}, unfinished=[3])  # 16, of which nobody asks for one
        said.append(tokens + driver.step(decode=[0, 1, 2], chunks={3: second[:13]}))  # 16
    assert drivers[1].runner.pieces is not None
    assert said[0] == said[1]
    for old, new in zip(*map(cached, drivers), strict=True):
        assert torch.equal(old, new)


def test_padding_writes_nowhere_but_to_scratch() -> None:
    long, short = random_prompts([60, 21], seed=2)
    eager, pieces = pair_of_drivers(SPECS["qwen3"], 64, "auto")
    for driver in (eager, pieces):
        driver.step(chunks={0: long})
        driver.step(chunks={1: short})  # where the padding of the step before was written, and its places still are
    for old, new in zip(cached(eager), cached(pieces), strict=True):
        assert torch.equal(old == 0, new == 0)
        torch.testing.assert_close(old, new, atol=0.05, rtol=0.05)


def test_larger_steps_and_decodes_go_as_before() -> None:
    eager, pieces = pair_of_drivers(SPECS["qwen3"], 32, "auto")
    for driver in (eager, pieces):
        driver.step(chunks={0: random_prompts([200], seed=3)[0]})
        driver.step(decode=[0])
    for old, new in zip(cached(eager), cached(pieces), strict=True):
        assert torch.equal(old, new)
