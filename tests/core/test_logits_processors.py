"""Special requests on a real model: against a slow direct computation, whatever runs beside them and however.

Every request is compared with `slow_answer`: tokens exactly, log-probabilities to 1e-4.
"""

import functools
import itertools
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
import torch

from helpers import tp_cases
from helpers.constraints import Cycle, cycle
from helpers.models import EOS, tiny_spec
from helpers.retract import events_of
from helpers.simulation import record_plans
from helpers.special import Answer, SlowAnswer, answers_of, slow_answer, special_requests
from minisgl.core import logits as logits_module
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.types import FinishReason, Grammar, ModelInfo, Request, SamplingParams, TokenEvent
from minisgl.core.weights import Weights, dummy_weights
from minisgl.gpu.executor import make_executor

LIMIT = 128
SPEC = tiny_spec(windows=(0, 24))


@functools.cache
def weights() -> Weights:
    torch.set_num_threads(1)
    return dummy_weights(SPEC, torch.float32, torch.device("cpu"))


def make_engine(**settings: object) -> Engine:
    config = tp_cases.config(**{"max_prefill_length": 8192, "num_pages": 64, "page_size": 16, **settings})
    model = ModelInfo(name="tiny", vocab_size=SPEC.vocab_size, max_seq_len=LIMIT, eos_token_ids=(EOS,))
    executor = make_executor(SPEC, weights(), config, LIMIT)
    return Engine(executor, model, config, lambda grammar: Cycle(grammar, SPEC.vocab_size, EOS))


def run(engine: Engine, *requests: Request) -> list[TokenEvent]:
    """All events of requests that are added at once."""
    events = list(events_of(engine, requests))
    assert engine.cache.num_owned == 0
    return events


def greedy(name: str, prompt: list[int], **params: Any) -> Request:
    return Request.make(id=name, prompt=prompt, params=SamplingParams(temperature=0.0, **params))


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
    check(answers_of(engine, requests, retractions=12 if retract else 0), requests)
    assert (engine.stats().retracted >= 4) == retract


@pytest.mark.parametrize(("overlap", "batch", "chunk"), list(itertools.product([True, False], [8, 40], [7, 8192])))
def test_no_dear_grammar_changes_a_special_answer(
    overlap: bool, batch: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = special_requests(SPEC.vocab_size)
    engine = make_engine(overlap=overlap, max_running_requests=batch, max_prefill_length=chunk)
    postponed: list[int] = []
    hold = engine.scheduler._hold

    def make_dear(grammar: Grammar) -> Cycle:
        constraint = Cycle(grammar, SPEC.vocab_size, EOS)
        constraint.millis = 10
        return constraint

    def record(slots: Any) -> None:
        postponed.extend(slots.tolist())
        hold(slots)

    engine.constraints = make_dear
    monkeypatch.setattr(engine.scheduler, "_hold", record)
    observer = Mock()
    engine.observers.append(observer)
    check(answers_of(engine, requests, retractions=3), requests)
    assert len(postponed) > 20
    admitted = [name for call in observer.observe.call_args_list for name, _ in call.args[0].admitted]
    assert len(admitted) == len(requests) + engine.stats().retracted


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
    check(answers_of(make_engine(), requests), requests)


def test_a_prompt_that_wants_scores_is_not_taken_from_the_cache_but_goes_there() -> None:
    engine = make_engine()
    for name, prompt_logprobs, cached in (("a", 1, 0), ("b", None, 48), ("c", 1, 0)):
        request = greedy(name, list(range(1, 60)), max_tokens=2, prompt_logprobs=prompt_logprobs)
        events = run(engine, request)
        assert len(events[0].prompt_logprobs) == (59 if prompt_logprobs else 0)
        assert events[-1].cached_tokens == cached


def test_a_prompt_retracted_between_chunks_is_scored_once() -> None:
    request = greedy("x", [3 * i % 200 for i in range(100)], max_tokens=3, prompt_logprobs=2)
    engine = make_engine(max_prefill_length=20)
    answer = answers_of(engine, [request], retractions=2, every=3)["x"]
    assert engine.stats().retracted == 2
    slow_answer(SPEC, weights(), request, LIMIT).check(answer, request.params)


def test_scores_are_right_for_stop_tokens_and_a_prompt_of_one_token() -> None:
    request = greedy("x", [9], max_tokens=4, logprobs=3, prompt_logprobs=1, logit_bias={EOS: 100.0}, min_tokens=2)
    slow = slow_answer(SPEC, weights(), request, LIMIT)
    assert slow.tokens[-1] == EOS
    assert len(slow.tokens) == 3
    got = answers_of(make_engine(), [request])["x"]
    slow.check(got, request.params)
    assert got.prompt_logprobs == [None]


def test_a_bias_of_a_hundred_decides_and_of_minus_a_hundred_forbids() -> None:
    request = greedy("x", [1, 2], max_tokens=5, logit_bias={17: 100.0, 18: -100.0}, ignore_eos=True)
    assert answers_of(make_engine(), [request])["x"].tokens == [17] * 5


FEW = tuple(range(0, SPEC.vocab_size, 9))
FILTERED: dict[str, dict[str, Any]] = {
    "few tokens": {"allowed_token_ids": FEW},
    "few tokens, sampled": {"allowed_token_ids": FEW[:7], "temperature": 0.9, "top_p": 0.9, "logprobs": 3},
    "few tokens and penalties": {"allowed_token_ids": FEW[:5], "frequency_penalty": 0.9, "logit_bias": {FEW[1]: 5.0}},
    "no token": {"bad_word_ids": tuple((token,) for token in range(40, SPEC.vocab_size))},
    "no pair": {"logit_bias": {17: 100.0, 18: 99.0}, "bad_word_ids": ((17, 17), (18, 18), (17, 18, 17, 18))},
    "no triple": {"allowed_token_ids": (4, 5, 6), "bad_word_ids": ((4, 4, 5), (5, 4, 5), (5, 5), (4, 4, 4))},
    "nothing left": {"allowed_token_ids": (4, 5), "bad_word_ids": ((4, 4, 5), (4, 4, 4), (5, 5), (5, 4))},
    "ids beyond the vocabulary": {"bad_word_ids": ((10**6,), (5, 10**6), (10**6, 5)), "logprobs": 1},
    "within a grammar": {"grammar": cycle(6, 5), "bad_word_ids": ((0,), (8, 14), (1, 7)), "allowed_token_ids": FEW},
    "no stop token": {"allowed_token_ids": (EOS, 3), "min_tokens": 4},
}


@pytest.mark.parametrize(("overlap", "retract"), [(True, False), (True, True), (False, False)])
def test_forbidden_tokens_and_words_are_never_sampled(overlap: bool, retract: bool) -> None:
    made = []
    for seed, (name, params) in enumerate(FILTERED.items()):
        sampling = SamplingParams(**{"seed": seed, "max_tokens": 14, "temperature": 0.0, **params})
        made.append(Request.make(id=name, prompt=[3 * seed + 1, 17, 4], params=sampling))
    ordinary = special_requests(SPEC.vocab_size)[:4]
    engine = make_engine(overlap=overlap, num_pages=24 if retract else 64)
    answers = answers_of(engine, [*made, *ordinary], retractions=6 if retract else 0)
    check({request.id: answers[request.id] for request in ordinary}, ordinary)
    for request in made:
        slow = slow_answer(SPEC, weights(), request, LIMIT)
        slow.check(answers[request.id], request.params)
        free = msgspec.structs.replace(request.params, allowed_token_ids=None, bad_word_ids=())
        without = slow_answer(SPEC, weights(), msgspec.structs.replace(request, params=free), LIMIT)
        assert (slow.tokens != without.tokens) == (request.id != "ids beyond the vocabulary"), request.id


def test_a_row_used_again_forgets_who_was_there() -> None:
    """Rows are taken in turn: with one row each request follows another's penalties, counts and biases."""
    requests = special_requests(SPEC.vocab_size)
    engine = make_engine(max_running_requests=1)
    for request in (requests[i] for i in (8, 1, 4, 3, 2, 4, 1, 8, 0, 2)):
        check(answers_of(engine, [request]), [request])


def test_ordinary_steps_run_no_logits_processors() -> None:
    engine = make_engine()
    plans = record_plans(engine)
    ordinary = [Request.make(id=str(i), prompt=[i + 1] * 5, params=SamplingParams(max_tokens=6)) for i in range(3)]
    answers_of(engine, ordinary)
    assert all(plan.logits is None for plan in plans)
    assert isinstance(engine.executor, LocalExecutor)
    tables = engine.executor.runner.logits_processors
    assert tables.seen is None
    assert tables.biases is None


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
    assert (len(got["breaks"].tokens), len(got["refuses"].tokens)) == (3, 3)


@pytest.mark.parametrize("params", [{"ignore_eos": True}, {"min_tokens": 9}])
def test_a_grammar_that_allows_nothing_more_ends_the_request_as_a_stop(params: dict[str, Any]) -> None:
    """With EOS ignored, and with min_tokens that the grammar cannot reach."""
    engine = make_engine()
    events = run(engine, greedy("x", [5, 6], grammar=cycle(3, 4), **params))
    tokens = [token for event in events for token in event.tokens]
    assert [7 * i <= token < 7 * i + 3 for i, token in enumerate(tokens[:4])] == [True] * 4
    assert tokens[4:] == ([EOS] if "ignore_eos" in params else [])
    assert (events[-1].finish, events[-1].tokens, events[-1].error) == (FinishReason.STOP, (), None)
