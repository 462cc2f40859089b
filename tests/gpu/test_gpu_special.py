"""Logits processors on the GPU: their results beside graphs, and that nothing waits for them."""

import functools

import msgspec
import pytest
import torch

from helpers.constraints import Cycle
from helpers.gpu import DEVICE, SPEC, Built, build, gpu_config, random_prompts, random_weights, to_float32
from helpers.models import EOS
from helpers.special import Answer, SlowAnswer, answers_of, slow_answer, special_requests
from minisgl.core.types import Request, SamplingParams
from minisgl.core.weights import Weights
from minisgl.gpu.cuda_graphs import DecodeGraphs
from minisgl.gpu.memory import prefill_plan

pytestmark = pytest.mark.gpu

LIMIT = 128
VOCAB = SPEC.vocab_size


@functools.cache
def weights(dtype: torch.dtype) -> Weights:
    rough = random_weights(SPEC, torch.bfloat16)
    return rough if dtype == torch.bfloat16 else to_float32(rough)


def make(dtype: str = "float32", **settings: object) -> Built:
    config = gpu_config(dtype=dtype, **{"attn": "triton", "num_pages": 64, **settings})
    built = build(SPEC, weights(getattr(torch, dtype)), config, max_seq_len=LIMIT)
    built.engine.constraints = lambda grammar: Cycle(grammar, VOCAB, EOS)
    return built


@functools.cache
def right() -> dict[str, SlowAnswer]:
    exact = weights(torch.float32)
    return {r.id: slow_answer(SPEC, exact, r, LIMIT, DEVICE) for r in special_requests(VOCAB)}


def check(got: dict[str, Answer], requests: list[Request]) -> None:
    for request in requests:
        right()[request.id].check(got[request.id], request.params, tolerance=2e-3)


@pytest.mark.parametrize("graphs", [8, 3, 0])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("retract", [False, True])
def test_special_answers_are_those_of_the_slow_computation(graphs: int, overlap: bool, retract: bool) -> None:
    requests = special_requests(VOCAB)
    built = make(
        cuda_graph_max_bs=graphs, overlap=overlap, max_prefill_length=8192 if overlap else 7,
        num_pages=24 if retract else 64,
    )  # fmt: skip
    check(answers_of(built.engine, requests, retractions=12 if retract else 0), requests)


def test_masks_reach_steps_that_are_replays() -> None:
    requests = [request for request in special_requests(VOCAB) if request.params.grammar is not None][:8]
    built = make(cuda_graph_max_bs=8)
    check(answers_of(built.engine, requests), requests)
    graphs = next(graphs for graphs in built.runner.graphs if isinstance(graphs, DecodeGraphs))
    replayed = [plan for plan in built.executor.plans if graphs.takes(plan)]
    assert any(len(plan.constrained_slots) for plan in replayed)


def test_graphs_change_no_bit_of_scores_at_fixed_batch_shapes() -> None:
    """bfloat16: every step has the same rows and a graph of that very size."""
    params = SamplingParams(
        temperature=0.8, max_tokens=40, ignore_eos=True, logprobs=20, frequency_penalty=0.5, logit_bias={7: 3.0}
    )
    requests = [
        Request.make(id=str(i), prompt=prompt, params=msgspec.structs.replace(params, seed=i))
        for i, prompt in enumerate(random_prompts([3 + i for i in range(8)], seed=4))
    ]
    on, off = (answers_of(make("bfloat16", cuda_graph_max_bs=n).engine, requests) for n in (8, 0))
    assert on == off
    assert all(len(answer.logprobs) == 40 for answer in on.values())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("graphs", [8, 0])
def test_special_steps_wait_for_nothing(graphs: int) -> None:
    built = make("bfloat16", cuda_graph_max_bs=graphs, max_prefill_length=100)
    requests = special_requests(VOCAB)
    answers_of(built.engine, requests)
    built.executor.strict = True
    got = answers_of(built.engine, requests)
    assert all(answer.tokens for answer in got.values())


def test_the_profile_reserves_what_special_rows_take() -> None:
    """The step that is measured allocates the tables that the first special request needs."""
    built = make("bfloat16", cuda_graph_max_bs=0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    built.runner.run(prefill_plan(8, 4, everything=True))
    torch.cuda.synchronize()
    seen = built.runner.logits_processors.seen
    assert seen is not None
    assert seen.shape == (9, VOCAB)
    assert torch.cuda.memory_allocated(DEVICE) - before >= seen.nbytes
