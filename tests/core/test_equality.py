"""Turning an optimisation off, or any knob anywhere, changes no token of a real model.

The product of cache, chunk, overlap, page size, batch and retraction, and a part of it for a third chunk, each run with
greedy and seeded requests, filtered in every way, against one request at a time without any of it.
"""

import functools
import itertools

import msgspec
import pytest
import torch

from helpers import tp_cases
from helpers.models import tiny_spec
from helpers.special import slow_answer
from helpers.tp_cases import MAX_SEQ_LEN
from minisgl.config import Config
from minisgl.core.types import Request, SamplingParams
from minisgl.core.weights import Weights, dummy_weights
from minisgl.gpu.executor import make_executor

SPEC = tiny_spec(windows=(0, 24))
REQUESTS = tp_cases.requests(SPEC.vocab_size, 64, longer=2, shared_len=40)
PLAIN = tp_cases.config(cache="naive", overlap=False, page_size=16, max_running_requests=1, num_pages=8)


@functools.cache
def weights() -> Weights:
    return dummy_weights(SPEC, torch.float32, torch.device("cpu"))


def generate(config: Config, wanted: list[Request], retractions: int = 0) -> list[list[int]]:
    executor = make_executor(SPEC, weights(), config, MAX_SEQ_LEN)
    return [answer.tokens for answer in tp_cases.generate(executor, SPEC, config, retractions, wanted)]


@functools.cache
def alone() -> list[list[int]]:
    """The tokens of each request when it has the engine to itself, with everything off."""
    return generate(PLAIN, REQUESTS)


COMBINATIONS = [
    *itertools.product(["radix", "naive"], [7, 8192], [True, False], [1, 16, 64], [1, 8, 64], [False, True]),
    *itertools.product(["radix", "naive"], [64], [True, False], [16], [8], [False, True]),
]
"""Chunks of 64 cut a prompt once or not at all, as the others do too: a few of them are enough."""


@pytest.mark.parametrize(("cache", "chunk", "overlap", "page_size", "batch", "retract"), COMBINATIONS)
def test_no_setting_changes_a_token(
    cache: str, chunk: int, overlap: bool, page_size: int, batch: int, retract: bool
) -> None:
    torch.set_num_threads(1)
    count = {1: 8, 8: 24, 64: 64}[batch]
    settings = tp_cases.config(
        cache=cache, max_prefill_length=chunk, overlap=overlap, page_size=page_size, max_running_requests=batch,
        num_pages=(256 if retract else 128 * batch) // page_size,
    )  # fmt: skip
    assert generate(settings, REQUESTS[:count], retractions=12 if retract else 0) == alone()[:count]


@pytest.mark.parametrize("only", [{"min_p": 0.2}, {"top_p": 0.5}, {"top_k": 3}])
def test_each_filter_alone_gives_the_tokens_of_the_reference(only: dict[str, float]) -> None:
    params = [SamplingParams(temperature=1.5, seed=i, max_tokens=12, ignore_eos=True, **only) for i in range(4)]  # type: ignore[arg-type]
    wanted = [Request.make(id=str(i), prompt=[i, 5, 9], params=params[i]) for i in range(4)]
    right = [slow_answer(SPEC, weights(), request, MAX_SEQ_LEN).tokens for request in wanted]
    assert generate(tp_cases.config(), wanted) == right
    unfiltered = [
        msgspec.structs.replace(r, params=msgspec.structs.replace(r.params, min_p=0.0, top_p=1.0, top_k=0))
        for r in wanted
    ]
    assert generate(tp_cases.config(), unfiltered) != right


def test_seeds_matter_at_a_temperature() -> None:
    wanted = [
        Request.make(id=str(i), prompt=[1, 2, 3], params=SamplingParams(temperature=0.8, seed=i // 2, max_tokens=12))
        for i in range(8)
    ]
    tokens = generate(tp_cases.config(), wanted)
    assert all(tokens[2 * i] == tokens[2 * i + 1] for i in range(4))
    assert len({tuple(t) for t in tokens}) == 4
