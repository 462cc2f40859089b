"""Special requests on a real model: against a slow direct computation, whatever runs beside them and however.

Every request is compared with `slow_answer`: tokens exactly, log-probabilities to 1e-4.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from helpers.constraints import Cycle, cycle
from helpers.invariants import check_cache
from helpers.models import tiny_spec
from helpers.simulation import record_plans
from helpers.special import Answer, SlowAnswer, slow_answer, special_requests
from minisgl.config import Config
from minisgl.core import logits as logits_module
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.logits import forbid, penalise, token_scores
from minisgl.core.request_state import State
from minisgl.core.types import FinishReason, Grammar, ModelInfo, Request, SamplingParams, TokenEvent
from minisgl.core.weights import Weights, dummy_weights
from minisgl.gpu.executor import make_executor

LIMIT = 128
SPEC = tiny_spec(windows=(0, 24))
EOS = SPEC.eos_token_ids[0]


@functools.cache
def weights() -> Weights:
    torch.set_num_threads(1)
    return dummy_weights(SPEC, torch.float32, torch.device("cpu"))


def make_engine(**settings: object) -> Engine:
    base = Config(
        device="cpu", dtype="float32", attn="torch,torch", cuda_graph_max_bs=0, max_running_requests=8,
        max_prefill_length=8192, memory_ratio=0.9, num_pages=64, page_size=16,
    )  # fmt: skip
    config = base.replace(**settings)
    model = ModelInfo(name="tiny", vocab_size=SPEC.vocab_size, max_seq_len=LIMIT, eos_token_ids=(EOS,))
    executor = make_executor(SPEC, weights(), config, LIMIT)
    return Engine(executor, model, config, lambda grammar: Cycle(grammar, SPEC.vocab_size, EOS))


def run(engine: Engine, *requests: Request) -> list[TokenEvent]:
    """All events of requests that are added at once."""
    for request in requests:
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
    assert engine.cache.num_owned == 0
    return events


def greedy(name: str, prompt: list[int], **params: Any) -> Request:
    return Request.make(id=name, prompt=prompt, params=SamplingParams(temperature=0.0, **params))


def answers(engine: Engine, requests: list[Request], retractions: int = 0) -> dict[str, Answer]:
    """Every fourth step one is retracted, up to `retractions` times."""
    out = {request.id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            assert not (event.prompt_logprobs and out[event.id].tokens)
            out[event.id].take(event)
        going = np.isin(engine.table.state, (State.PREFILL, State.DECODE)).any()
        if going and engine.scheduler.retracted < retractions and engine.scheduler.step % 4 == 3:
            engine.scheduler.retract_last()
    check_cache(engine.cache)
    assert engine.cache.num_owned == 0
    engine.close()
    return out


@functools.cache
def right() -> dict[str, SlowAnswer]:
    return {r.id: slow_answer(SPEC, weights(), r, LIMIT) for r in special_requests(SPEC.vocab_size)}


def check(got: dict[str, Answer], requests: list[Request]) -> None:
    for request in requests:
        right()[request.id].check(got[request.id], request.params)


COMBINATIONS = list(itertools.product([True, False], ["radix", "naive"], [7, 8192], [1, 8], [False, True]))


@pytest.mark.parametrize(("overlap", "cache", "chunk", "batch", "retract"), COMBINATIONS)
def test_no_setting_changes_a_special_answer(overlap: bool, cache: str, chunk: int, batch: int, retract: bool) -> None:
    requests = special_requests(SPEC.vocab_size)
    engine = make_engine(
        overlap=overlap, cache=cache, max_prefill_length=chunk, max_running_requests=batch,
        num_pages=24 if retract else 64,
    )  # fmt: skip
    check(answers(engine, requests, retractions=12 if retract else 0), requests)
    assert (engine.stats().retracted >= 4) == retract


@pytest.mark.parametrize(
    ("kind", "neutral"),
    [
        (1, {"presence_penalty": 0.0}),
        (2, {"frequency_penalty": 0.0}),
        (3, {"repetition_penalty": 1.0}),
        (4, {"logit_bias": {}}),
        (7, {"grammar": None}),
        (8, {"frequency_penalty": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}),
        (10, {"grammar": None}),
    ],
)
def test_what_is_compared_above_depends_on_each_parameter(kind: int, neutral: dict[str, object]) -> None:
    for request in special_requests(SPEC.vocab_size)[kind::11]:
        params = msgspec.structs.replace(request.params, **neutral)
        without = slow_answer(SPEC, weights(), Request.make(id="x", prompt=request.prompt, params=params), LIMIT)
        assert without.tokens != right()[request.id].tokens


def test_work_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "CHUNK_LOGITS", 3 * SPEC.vocab_size)
    requests = special_requests(SPEC.vocab_size)
    check(answers(make_engine(), requests), requests)


def test_a_prompt_that_wants_scores_is_not_taken_from_the_cache_but_goes_there() -> None:
    engine = make_engine()
    for name, prompt_logprobs, cached in (("a", 1, 0), ("b", None, 48), ("c", 1, 0)):
        request = greedy(name, list(range(1, 60)), max_tokens=2, prompt_logprobs=prompt_logprobs)
        events = run(engine, request)
        assert len(events[0].prompt_logprobs) == (59 if prompt_logprobs else 0)
        assert events[-1].cached_tokens == cached


def test_a_prompt_retracted_between_chunks_is_scored_on_from_where_it_was() -> None:
    request = greedy("x", [3 * i % 200 for i in range(100)], max_tokens=3, prompt_logprobs=2)
    engine = make_engine(max_prefill_length=20)
    engine.add(request)
    answer, steps = Answer(), 0
    while engine.has_work:
        for event in engine.step():
            answer.take(event)
        steps += 1
        if steps in (2, 5):
            engine.scheduler.retract_last()
    assert engine.stats().retracted == 2
    slow_answer(SPEC, weights(), request, LIMIT).check(answer, request.params)
    engine.close()


def test_scores_are_right_for_stop_tokens_and_a_prompt_of_one_token() -> None:
    request = greedy("x", [9], max_tokens=4, logprobs=3, prompt_logprobs=1, logit_bias={EOS: 100.0}, min_tokens=2)
    slow = slow_answer(SPEC, weights(), request, LIMIT)
    assert slow.tokens[-1] == EOS
    assert len(slow.tokens) == 3
    got = answers(make_engine(), [request])["x"]
    slow.check(got, request.params)
    assert got.prompt_logprobs == [None]


def test_a_bias_of_a_hundred_decides_and_of_minus_a_hundred_forbids() -> None:
    request = greedy("x", [1, 2], max_tokens=5, logit_bias={17: 100.0, 18: -100.0}, ignore_eos=True)
    assert answers(make_engine(), [request])["x"].tokens == [17] * 5


def test_a_row_used_again_forgets_who_was_there() -> None:
    """Rows are taken in turn: with one row each request follows another's penalties, counts and biases."""
    requests = special_requests(SPEC.vocab_size)
    engine = make_engine(max_running_requests=1)
    for request in (requests[i] for i in (8, 1, 4, 3, 2, 4, 1, 8, 0, 2)):
        answer = Answer()
        for event in run(engine, request):
            answer.take(event)
        right()[request.id].check(answer, request.params)
    engine.close()


def test_ordinary_steps_run_no_logits_processors() -> None:
    engine = make_engine()
    plans = record_plans(engine)
    answers(engine, [greedy(str(i), [i + 1] * 5, max_tokens=6) for i in range(3)])
    assert all(plan.logits is None for plan in plans)
    assert isinstance(engine.executor, LocalExecutor)
    tables = engine.executor.runner.logits_processors
    assert tables.seen is None
    assert tables.bias_ids is None


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failing_grammar_ends_its_own_request_only(overlap: bool) -> None:
    requests, failing = special_requests(SPEC.vocab_size), ("breaks", "refuses")
    broken = (greedy(x, [1, 2, 3], max_tokens=9, grammar=Grammar(kind="lark", source=x)) for x in failing)
    engine = make_engine(overlap=overlap, max_running_requests=16)
    got = {name: Answer() for name in (*(request.id for request in requests), *failing)}
    ends = {}
    for event in run(engine, *requests, *broken):
        if event.finish:
            ends[event.id] = event
        got[event.id].take(event if event.id not in failing else msgspec.structs.replace(event, error=None))
    check(got, requests)
    assert ends["breaks"].finish is ends["refuses"].finish is FinishReason.ERROR
    assert ends["breaks"].error == "the grammar failed: no fourth mask"
    assert "breaks the grammar" in (ends["refuses"].error or "")
    assert (len(got["breaks"].tokens), len(got["refuses"].tokens)) == (3, 2)
    engine.close()


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 9}])
def test_a_grammar_that_allows_nothing_more_ends_the_request_as_a_stop(params: dict[str, Any]) -> None:
    """With EOS ignored, and with min_tokens that the grammar cannot reach."""
    engine = make_engine()
    events = run(engine, greedy("x", [5, 6], grammar=cycle(3, 4), **params))
    tokens = [token for event in events for token in event.tokens]
    assert [7 * i <= token < 7 * i + 3 for i, token in enumerate(tokens[:4])] == [True] * 4
    assert tokens[4:] == ([EOS] if "ignore_eos" in params else [])
    assert (events[-1].finish, events[-1].tokens, events[-1].error) == (FinishReason.STOP, (), None)
    engine.close()


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.5, -0.5]])
    held = torch.tensor([[1 + 2, 1, 2, 2 * 2, 0, 0]], dtype=torch.int32)  # prompt 0, 1, 1, completion 2, 3, 3, 0
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
