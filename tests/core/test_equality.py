"""Turning an optimisation off, or any knob anywhere, changes no token of a real model.

The product of cache, chunk, overlap, page size, batch and retraction, and a part of it for a third chunk, each run with
greedy and seeded requests at temperature 0.8, against one request at a time without any of it.
"""

from __future__ import annotations

import functools
import itertools

import msgspec
import numpy as np
import pytest
import torch

from helpers.models import tiny_spec
from helpers.retract import events_of
from helpers.special import slow_answer
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.types import ModelInfo, Request, SamplingParams
from minisgl.core.weights import Weights, dummy_weights
from minisgl.gpu.executor import make_executor

MAX_SEQ_LEN = 128
REQUESTS = 64
SPEC = tiny_spec(windows=(0, 24))


@functools.cache
def weights() -> Weights:
    return dummy_weights(SPEC, torch.float32, torch.device("cpu"))


def requests() -> list[Request]:
    """Half greedy, half sampled; half share a prefix; long and short, some that stop on EOS."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, SPEC.vocab_size, 40).tolist()
    made = []
    for i in range(REQUESTS):
        own = rng.integers(0, SPEC.vocab_size, rng.integers(1, 30)).tolist()
        params = SamplingParams(
            temperature=0.8 * (i % 2),
            top_p=(1.0, 0.9, 1.0)[i % 3],
            top_k=(0, 0, 20)[i % 3],
            seed=i,
            max_tokens=6 + i % 7,
            ignore_eos=i % 4 != 0,
        )
        made.append(Request.make(id=str(i), prompt=(shared if i % 4 < 2 else []) + own, params=params))
    return made


def generate(config: Config, wanted: list[Request], retractions: int = 0) -> tuple[list[list[int]], Engine]:
    """Every request's tokens, all added at once; every fifth step one is retracted, up to `retractions` times."""
    executor = make_executor(SPEC, weights(), config, MAX_SEQ_LEN)
    model = ModelInfo(
        name="tiny", vocab_size=SPEC.vocab_size, max_seq_len=MAX_SEQ_LEN, eos_token_ids=SPEC.eos_token_ids
    )
    engine = Engine(executor, model, config)
    tokens: dict[str, list[int]] = {request.id: [] for request in wanted}
    for event in events_of(engine, wanted, retractions):
        tokens[event.id] += event.tokens
    assert engine.cache.num_owned == 0
    engine.close()
    return [tokens[request.id] for request in wanted], engine


def config(**settings: object) -> Config:
    """A resolved configuration for the CPU."""
    base = Config(
        device="cpu", dtype="float32", attn="torch,torch", cuda_graph_max_bs=0, max_running_requests=8,
        max_prefill_length=8192, memory_ratio=0.9, num_pages=1024,
    )  # fmt: skip
    return base.replace(**settings)


@functools.cache
def alone() -> list[list[int]]:
    """The tokens of each request when it has the engine to itself, with everything off."""
    plain = config(cache="naive", overlap=False, page_size=16, max_running_requests=1, num_pages=8)
    return generate(plain, requests())[0]


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
    count = {1: 8, 8: 24, 64: REQUESTS}[batch]
    settings = config(
        cache=cache, max_prefill_length=chunk, overlap=overlap, page_size=page_size, max_running_requests=batch,
        num_pages=(2 * MAX_SEQ_LEN if retract else MAX_SEQ_LEN * batch) // page_size,
    )  # fmt: skip
    tokens, engine = generate(settings, requests()[:count], retractions=12 if retract else 0)
    assert tokens == alone()[:count]
    assert (engine.stats().retracted >= 4) == retract


@pytest.mark.parametrize("only", [{"min_p": 0.2}, {"top_p": 0.5}, {"top_k": 3}])
def test_each_filter_alone_gives_the_tokens_of_the_reference(only: dict[str, float]) -> None:
    params = [SamplingParams(temperature=1.5, seed=i, max_tokens=12, ignore_eos=True, **only) for i in range(4)]  # type: ignore[arg-type]
    wanted = [Request.make(id=str(i), prompt=[i, 5, 9], params=params[i]) for i in range(4)]
    right = [slow_answer(SPEC, weights(), request, MAX_SEQ_LEN).tokens for request in wanted]
    assert generate(config(), wanted)[0] == right
    unfiltered = [
        msgspec.structs.replace(r, params=msgspec.structs.replace(r.params, min_p=0.0, top_p=1.0, top_k=0))
        for r in wanted
    ]
    assert generate(config(), unfiltered)[0] != right


def test_seeds_matter_at_a_temperature() -> None:
    wanted = [
        Request.make(id=str(i), prompt=[1, 2, 3], params=SamplingParams(temperature=0.8, seed=i // 2, max_tokens=12))
        for i in range(8)
    ]
    tokens, _ = generate(config(), wanted)
    assert all(tokens[2 * i] == tokens[2 * i + 1] for i in range(4))
    assert len({tuple(t) for t in tokens}) == 4
