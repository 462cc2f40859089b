"""The scheduler over the simulated device, where a wrong page or length changes the tokens."""

from __future__ import annotations

import dataclasses
import itertools

import msgspec
import numpy as np
import pytest

from helpers.simulation import VOCAB, expected_tokens, record_plans, request, run, simulated_engine, tokens_of
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import StepResult
from minisgl.core.policy import POLICIES, LongestPrefixMatch
from minisgl.core.request_state import Entry, State
from minisgl.core.types import FinishReason, Grammar, Request, TokenEvent
from minisgl.errors import ContextLengthError, EngineDeadError, InvalidRequestError


def prompts(count: int, low: int, high: int, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Random prompts with `low` to `high` own tokens after `shared` common ones."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCAB, shared).tolist()
    return [common + rng.integers(0, VOCAB, rng.integers(low, high + 1)).tolist() for _ in range(count)]


SETTINGS = list(itertools.product(["radix", "naive"], [1, 4, 16], [7, 64, 8192], [True, False], [1, 8], POLICIES))


@pytest.mark.parametrize(("cache", "page_size", "chunk", "overlap", "rows", "policy"), SETTINGS)
def test_tokens_do_not_depend_on_any_setting(
    cache: str, page_size: int, chunk: int, overlap: bool, rows: int, policy: str
) -> None:
    engine = simulated_engine(
        cache=cache,
        page_size=page_size,
        num_pages=256 // page_size,
        max_prefill_length=chunk,
        overlap=overlap,
        max_running_requests=rows,
        schedule_policy=policy,
    )
    requests = [
        request(str(i), p, max_tokens=3 + 5 * (i % 4), temperature=0.8 * (i % 2), seed=i, min_tokens=i % 3)
        for i, p in enumerate(prompts(12, 1, 40, shared=20))
    ]
    events = run(engine, requests)
    for r in requests:
        assert tokens_of(events[r.id]) == expected_tokens(r, engine.model.max_seq_len)
        assert [e.finish is not None for e in events[r.id]] == [False] * (len(events[r.id]) - 1) + [True]
    assert engine.cache.num_owned == 0
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("cache", ["radix", "naive"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_running_out_of_pages_retracts_and_loses_nothing(overlap: bool, cache: str, page_size: int) -> None:
    engine = simulated_engine(
        num_pages=120 // page_size, page_size=page_size, max_seq_len=100, cache=cache, overlap=overlap
    )
    requests = [request(str(i), p, max_tokens=60, ignore_eos=True) for i, p in enumerate(prompts(10, 5, 30))]
    events = run(engine, requests)
    assert engine.stats().retracted > 0
    for r in requests:
        assert tokens_of(events[r.id]) == expected_tokens(r, engine.model.max_seq_len)
        assert events[r.id][-1].finish is FinishReason.LENGTH
    assert engine.cache.num_owned == 0


def test_retraction_never_takes_the_oldest() -> None:
    engine = simulated_engine(num_pages=24, page_size=4, max_seq_len=96, cache="naive", overlap=False)
    for i in range(4):
        engine.add(request(str(i), [i] * 8, max_tokens=40, ignore_eos=True))
    ends: list[str] = []
    while engine.has_work:
        ends += [event.id for event in engine.step() if event.finish]
        oldest = engine.scheduler.live.get("0")
        assert oldest is None or oldest.slot >= 0
    assert engine.stats().retracted > 0
    assert ends == ["0", "1", "2", "3"]


def test_running_requests_decode_in_every_step_in_which_a_long_prompt_is_prefilled() -> None:
    engine = simulated_engine(max_prefill_length=8, num_pages=128, max_seq_len=400)
    plans = record_plans(engine)
    for i in range(3):
        engine.add(request(str(i), [i] * 4, max_tokens=100, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.add(request("long", range(50), max_tokens=2, ignore_eos=True))
    before = len(plans)
    while "long" in engine.scheduler.live:
        engine.step()
    chunks = [plan for plan in plans[before:] if len(plan.prefill_slots)]
    assert [int(plan.prefill_lens.sum()) for plan in chunks] == [8, 8, 8, 8, 8, 8, 2]
    assert all(len(plan.decode_slots) == 3 for plan in chunks)


def test_the_prefill_budget_bounds_every_step() -> None:
    engine = simulated_engine(max_prefill_length=10, num_pages=256)
    plans = record_plans(engine)
    run(engine, [request(str(i), p, max_tokens=3) for i, p in enumerate(prompts(20, 1, 50))])
    assert max(len(plan.prefill_tokens) for plan in plans) == 10


def test_admission_does_not_reserve_max_tokens() -> None:
    engine = simulated_engine(num_pages=40, page_size=4, max_seq_len=160, max_prefill_length=64)
    for i in range(8):
        engine.add(request(str(i), [i, i, i], max_tokens=150, ignore_eos=True))
    engine.step()
    assert engine.stats().running == 8


def test_requests_that_share_a_prefix_share_its_pages_even_in_their_first_step() -> None:
    engine = simulated_engine(num_pages=64, page_size=4, max_prefill_length=8192)
    shared = list(range(32))
    events = run(engine, [request(str(i), [*shared, i], max_tokens=2) for i in range(8)])
    assert [events[str(i)][0].cached_tokens for i in range(8)] == [0] + [32] * 7


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("when", range(12))
def test_abort_at_any_moment_ends_with_one_event_and_frees_everything(overlap: bool, when: int) -> None:
    engine = simulated_engine(overlap=overlap, max_prefill_length=8, max_running_requests=2)
    requests = [request(str(i), p, max_tokens=4, ignore_eos=True) for i, p in enumerate(prompts(4, 20, 20))]
    for r in requests:
        engine.add(r)
    events: list[TokenEvent] = []
    for _ in range(when):
        events += engine.step()
    ended = {e.id for e in events if e.finish}
    engine.abort(["0", "1", "3", "unknown"])
    engine.abort(["0"])
    while engine.has_work:
        events += engine.step()
        engine.cache.check()
    for r in requests:
        mine = [e for e in events if e.id == r.id]
        assert [e.finish is not None for e in mine] == [False] * (len(mine) - 1) + [True]
        aborted = r.id in "013" and r.id not in ended
        assert mine[-1].finish is (FinishReason.ABORT if aborted else FinishReason.LENGTH)
    assert engine.cache.num_owned == 0
    assert engine.cache.flush() + engine.cache.num_free >= 0
    assert engine.cache.num_free == engine.executor.num_pages
    assert not engine.table.in_flight.any()
    assert (engine.table.state == State.FREE).all()


@pytest.mark.parametrize("when", range(1, 60, 3))
def test_abort_among_retractions_frees_everything(when: int) -> None:
    engine = simulated_engine(num_pages=12, page_size=4, max_seq_len=48, overlap=True)
    for i in range(3):
        engine.add(request(str(i), [i] * 8, max_tokens=30, ignore_eos=True))
    events = [event for _ in range(when) for event in engine.step()]
    live = list(engine.scheduler.live)
    engine.abort(live)
    while engine.has_work:
        events += engine.step()
        engine.cache.check()
    assert sorted(e.id for e in events if e.finish is FinishReason.ABORT) == live
    assert engine.cache.num_owned == 0


def test_stop_tokens_end_a_request_and_min_tokens_holds_them_off() -> None:
    engine = simulated_engine(num_pages=256, max_seq_len=512, page_size=4)
    wanted = [request(str(i), [i, i + 1], max_tokens=400, min_tokens=m) for i, m in enumerate([0, 0, 100, 100])]
    events = run(engine, wanted)
    for r in wanted:
        tokens = tokens_of(events[r.id])
        assert tokens == expected_tokens(r, 512)
        assert len(tokens) > r.params.min_tokens
        assert 7 not in tokens[: r.params.min_tokens]
        stopped = events[r.id][-1].finish is FinishReason.STOP
        assert stopped == (tokens[-1] == 7)


def test_max_tokens_one_never_decodes() -> None:
    engine = simulated_engine()
    plans = record_plans(engine)
    events = run(engine, [request("a", [1, 2, 3], max_tokens=1, ignore_eos=True)])
    assert len(tokens_of(events["a"])) == 1
    assert len(plans) == 1


def test_a_request_fills_the_last_page_and_ends_by_length() -> None:
    engine = simulated_engine(num_pages=8, page_size=4, max_seq_len=32)
    events = run(engine, [request("a", [1] * 31, ignore_eos=True), request("b", [2] * 20, ignore_eos=True)])
    assert len(tokens_of(events["a"])) == 1
    assert len(tokens_of(events["b"])) == 12
    assert events["b"][-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Request(id="x", prompt=[], params=request("", [0]).params), InvalidRequestError),
        (request("x", [VOCAB]), InvalidRequestError),
        (request("x", [-1]), InvalidRequestError),
        (request("x", [1] * 128), ContextLengthError),
        (request("x", [1] * 100, max_tokens=29), ContextLengthError),
        (request("x", [1], max_tokens=0), InvalidRequestError),
        (request("x", [1], max_tokens=-1), InvalidRequestError),
        (request("x", [1], temperature=float("nan")), InvalidRequestError),
        (request("x", [1], top_p=0.0), InvalidRequestError),
        (request("x", [1], top_p=1.5), InvalidRequestError),
        (request("x", [1], top_k=-2), InvalidRequestError),
        (request("x", [1], min_p=2.0), InvalidRequestError),
        (request("x", [1], max_tokens=1, min_tokens=2), InvalidRequestError),
        (request("x", [1], stop=("",)), InvalidRequestError),
        (request("x", [1], stop_token_ids=(VOCAB,)), InvalidRequestError),
        (request("x", [1], stop_token_ids=tuple(range(40))), InvalidRequestError),
        (request("x", [1], seed=2**70), InvalidRequestError),
        (request("x", [1], presence_penalty=2.5), InvalidRequestError),
        (request("x", [1], frequency_penalty=float("nan")), InvalidRequestError),
        (request("x", [1], repetition_penalty=0.0), InvalidRequestError),
        (request("x", [1], logit_bias={VOCAB: 1.0}), InvalidRequestError),
        (request("x", [1], logit_bias={1: float("nan")}), InvalidRequestError),
        (request("x", [1], logprobs=21), InvalidRequestError),
        (request("x", [1], prompt_logprobs=-1), InvalidRequestError),
        (request("x", [1], grammar=Grammar(kind="regex", source="unknown")), InvalidRequestError),
        (msgspec.structs.replace(request("x", [1]), priority=2**70), InvalidRequestError),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_door(bad: Request, error: type[Exception]) -> None:
    engine = simulated_engine()
    with pytest.raises(error):
        engine.add(bad)
    assert not engine.has_work


def test_an_id_that_is_live_is_refused() -> None:
    engine = simulated_engine()
    engine.add(request("x", [1]))
    with pytest.raises(InvalidRequestError):
        engine.add(request("x", [2]))


def run_to_end(engine: Engine) -> None:
    """Step until nothing is left."""
    while engine.has_work:
        engine.step()


def test_a_failed_step_ends_the_engine_instead_of_hanging_it() -> None:
    engine = simulated_engine()

    def explode() -> StepResult:
        raise RuntimeError("device lost")

    engine.executor.collect = explode  # type: ignore[method-assign]
    engine.add(request("x", [1], max_tokens=5))
    with pytest.raises(RuntimeError, match="device lost"):
        run_to_end(engine)
    assert not engine.has_work
    with pytest.raises(EngineDeadError):
        engine.add(request("y", [1]))


def test_every_policy_has_a_name_on_the_command_line() -> None:
    (field,) = (field for field in dataclasses.fields(Config) if field.name == "schedule_policy")
    assert field.metadata["choices"] == tuple(POLICIES)


def test_longest_prefix_first_prefers_cached_prompts_until_others_have_waited_too_long() -> None:
    entries = [Entry(request(str(i), [i]), arrival=i, step=0, seed=0, limit=9, eos=()) for i in range(4)]
    cached = {"0": 0, "1": 8, "2": 4, "3": 8}
    policy = LongestPrefixMatch(patience=10)

    def order(step: int) -> list[str]:
        return [e.request.id for e in policy.order(entries, lambda e: cached[e.request.id], step)]

    assert order(9) == ["1", "3", "2", "0"]
    entries[0].queued_step = -1
    assert order(9) == ["0", "1", "3", "2"]
    assert order(10) == ["0", "1", "2", "3"]


def test_prompt_tokens_are_counted_with_what_was_cached_of_them_when_a_row_is_given() -> None:
    engine = simulated_engine(max_running_requests=2, num_pages=8)
    prompt = prompts(1, 12, 12)[0]
    for i in range(4):
        engine.add(request(str(i), prompt, max_tokens=12))
    assert engine.stats().prompt_tokens == 0
    seen = set()
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        assert stats.cached_prompt_tokens <= stats.prompt_tokens
        seen.add(stats.prompt_tokens)
    assert seen >= {24, 48}
    assert stats.retracted
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (48, 3 * 8)
