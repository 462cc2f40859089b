"""The scheduler over the simulated device, where a wrong page or length changes the tokens."""

import itertools
import time
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest

from helpers import simulation
from helpers.constraints import cycle
from helpers.simulation import VOCAB, advance, check_answers, record_plans, request, run, simulated_engine, tokens_of
from minisgl.config import SCHEDULE_POLICIES
from minisgl.core.plan import StepResult
from minisgl.core.policy import POLICIES
from minisgl.core.request_state import State
from minisgl.core.types import FinishReason, Grammar, Request, SamplingParams
from minisgl.errors import ContextLengthError, EngineDeadError, InvalidRequestError


def prompts(count: int, low: int, high: int, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Random prompts with `low` to `high` own tokens after `shared` common ones."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCAB, shared).tolist()
    return [common + rng.integers(0, VOCAB, rng.integers(low, high + 1)).tolist() for _ in range(count)]


NAMES = ("cache", "page_size", "max_prefill_length", "overlap", "max_running_requests", "schedule_policy")
VALUES = itertools.product(["radix", "naive"], [1, 4, 16], [7, 64, 8192], [True, False], [1, 8], POLICIES)


@pytest.mark.parametrize("settings", [dict(zip(NAMES, values, strict=True)) for values in VALUES])
def test_tokens_do_not_depend_on_any_setting(settings: dict[str, Any]) -> None:
    engine = simulated_engine(num_pages=256 // settings["page_size"], **settings)
    requests = [
        request(str(i), p, max_tokens=3 + 5 * (i % 4), temperature=0.8 * (i % 2), seed=i, min_tokens=i % 3)
        for i, p in enumerate(prompts(12, 1, 40, shared=20))
    ]
    check_answers(engine, requests, run(engine, requests))


@pytest.mark.parametrize(("overlap", "cache", "page_size"), [*itertools.product([1, 0], ["radix", "naive"], [1, 4])])
def test_running_out_of_pages_retracts_and_loses_nothing(overlap: int, cache: str, page_size: int) -> None:
    settings: dict[str, Any] = {"page_size": page_size, "cache": cache, "overlap": bool(overlap)}
    engine = simulated_engine(num_pages=120 // page_size, max_seq_len=100, **settings)
    requests = [request(str(i), p, max_tokens=60, ignore_eos=True) for i, p in enumerate(prompts(10, 5, 30))]
    events = run(engine, requests)
    assert engine.stats().retracted > 0
    check_answers(engine, requests, events)
    assert {mine[-1].finish for mine in events.values()} == {FinishReason.LENGTH}
    for mine in events.values():
        assert len({event.cached_tokens for event in mine}) == 1, "tokens of a retracted request count as cached"


def test_each_admission_brings_a_request_further() -> None:
    engine = simulated_engine(page_size=1, num_pages=40, max_seq_len=40, cache="naive")
    for i in range(6):
        engine.add(request(str(i), [i] * 9, max_tokens=20, ignore_eos=True))
    tokens, admitted_with = Counter[str](), dict[str, int]()
    while engine.has_work:
        tokens.update(event.id for event in engine.step() if event.tokens)
        for name in engine.admitted:
            assert tokens[name] > admitted_with.get(name, -1)
            admitted_with[name] = tokens[name]
    assert engine.stats().retracted > 0


def test_running_requests_decode_in_every_step_in_which_a_long_prompt_is_prefilled() -> None:
    engine = simulated_engine(max_prefill_length=8, num_pages=128, max_seq_len=400)
    plans = record_plans(engine)
    for i in range(3):
        engine.add(request(str(i), [i] * 4, max_tokens=100, ignore_eos=True))
    advance(engine, 5)
    engine.add(request("long", range(50), max_tokens=2, ignore_eos=True))
    before = len(plans)
    while "long" in engine.scheduler.live:
        engine.step()
    chunks = [plan for plan in plans[before:] if len(plan.prefill_slots)]
    assert [int(plan.prefill_lens.sum()) for plan in chunks] == [8, 8, 8, 8, 8, 8, 2]
    assert all(len(plan.decode_slots) == 3 for plan in chunks)


def test_plans_keep_to_the_prefill_budget_and_decode_the_longest_row_first() -> None:
    engine = simulated_engine(max_prefill_length=27)
    plans = record_plans(engine)
    run(engine, [request(str(i), [i] * n, max_tokens=4, ignore_eos=True) for i, n in enumerate((3, 9, 1, 9, 5))])
    assert [plan.decode_slots.tolist() for plan in plans[1:]] == [[1, 3, 4, 0, 2]] * 3
    plans.clear()
    run(engine, [request(str(i), p, max_tokens=1) for i, p in enumerate(prompts(20, 1, 50))])
    assert max(len(plan.prefill_tokens) for plan in plans) == 27


@pytest.mark.parametrize(("pages", "own", "other", "when"), [(5, 4, 8, 5), (5, 7, 8, 2), (6, 8, 8, 5), (7, 7, 8, 6)])
def test_a_row_that_is_about_to_leave_gives_its_pages_before_any_is_retracted(
    pages: int, own: int, other: int, when: int
) -> None:
    engine = simulated_engine(num_pages=pages, page_size=4, max_seq_len=24, cache="naive", max_prefill_length=64)
    engine.add(request("a", [1] * own, max_tokens=20 - own, ignore_eos=True))
    engine.add(request("b", [2] * other, max_tokens=20 - other, ignore_eos=True))
    advance(engine, when)
    engine.abort(["b"])
    advance(engine)
    assert engine.stats().retracted == 0


@pytest.mark.parametrize(("pages", "chunk", "length"), [(8, 4, 13), (8, 8, 15), (10, 8, 17), (13, 16, 9)])
def test_admission_leaves_the_pages_that_running_rows_will_soon_take(pages: int, chunk: int, length: int) -> None:
    engine = simulated_engine(num_pages=pages, max_seq_len=40, cache="naive", max_prefill_length=chunk)
    run(engine, [request(str(i), [i] * length, max_tokens=5, ignore_eos=True) for i in range(4)])
    assert engine.stats().retracted == 0


def test_admission_does_not_reserve_max_tokens() -> None:
    engine = simulated_engine(num_pages=40, page_size=4, max_seq_len=160, max_prefill_length=64)
    for i in range(8):
        engine.add(request(str(i), [i, i, i], max_tokens=150, ignore_eos=True))
    engine.step()
    assert engine.stats().running == 8


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("when", range(12))
def test_abort_at_any_moment_ends_with_one_event_and_frees_everything(overlap: bool, when: int) -> None:
    engine = simulated_engine(overlap=overlap, max_prefill_length=8, max_running_requests=2)
    requests = [request(str(i), p, max_tokens=4, ignore_eos=True) for i, p in enumerate(prompts(4, 20, 20))]
    for r in requests:
        engine.add(r)
    events = advance(engine, when)
    ended = {e.id for e in events if e.finish}
    engine.abort(["0", "1", "3", "unknown"])
    engine.abort(["0"])
    events += advance(engine)
    for r in requests:
        mine = [e for e in events if e.id == r.id]
        assert [e.finish is not None for e in mine] == [False] * (len(mine) - 1) + [True]
        aborted = r.id in "013" and r.id not in ended
        assert mine[-1].finish is (FinishReason.ABORT if aborted else FinishReason.LENGTH)
    assert engine.cache.num_owned == 0
    engine.cache.flush()
    assert engine.cache.num_free == engine.executor.num_pages
    assert (engine.table.state == State.FREE).all()


def test_nothing_is_kept_of_requests_that_end_before_any_step() -> None:
    engine = simulated_engine()
    for name in ("a", "b"):
        engine.add(request(name, [1]))
        engine.abort([name])
        assert [event.finish for event in engine.step()] == [FinishReason.ABORT]
    assert (engine.scheduler.ended, engine.has_work) == ([], False)


def test_an_aborted_request_owns_nothing_while_a_step_with_it_runs() -> None:
    engine = simulated_engine(max_running_requests=1, cache="naive")
    engine.add(request("a", [1] * 20, max_tokens=9, ignore_eos=True))
    advance(engine, 4)
    engine.abort(["a"])
    assert engine.cache.num_free == engine.executor.num_pages
    following = request("b", [2] * 20, max_tokens=9, ignore_eos=True)
    check_answers(engine, [following], run(engine, [following]))


def test_stop_tokens_end_a_request_and_min_tokens_holds_them_off() -> None:
    engine = simulated_engine(num_pages=256, max_seq_len=512, page_size=4)
    wanted = [request(str(i), [i, i + 1], max_tokens=400, min_tokens=m) for i, m in enumerate([0, 0, 100, 100])]
    events = run(engine, wanted)
    check_answers(engine, wanted, events)
    for r in wanted:
        tokens = tokens_of(events[r.id])
        assert len(tokens) > r.params.min_tokens
        assert 7 not in tokens[: r.params.min_tokens]
        stopped = events[r.id][-1].finish is FinishReason.STOP
        assert stopped == (tokens[-1] == 7)


def test_min_tokens_of_any_size_hold_stop_tokens_off_up_to_the_limit() -> None:
    events = run(simulated_engine(), [request("a", [1], min_tokens=2**64)])["a"]
    assert len(tokens_of(events)) == 127
    assert 7 not in tokens_of(events)


def test_a_request_fills_the_last_page_and_ends_by_length_and_the_last_token_is_not_decoded() -> None:
    engine = simulated_engine(num_pages=8, page_size=4, max_seq_len=32)
    events = run(engine, [request("a", [1] * 31, ignore_eos=True), request("b", [2] * 20, ignore_eos=True)])
    assert [len(tokens_of(events[name])) for name in "ab"] == [1, 12]
    assert events["b"][-1].finish is FinishReason.LENGTH
    plans = record_plans(engine)
    run(engine, [request("a", [1, 2, 3], max_tokens=1, ignore_eos=True)])
    assert len(plans) == 1


REFUSED: dict[str, tuple[Any, ...]] = {
    "max_tokens": (0, -1), "min_tokens": (-1,), "temperature": (float("nan"), -0.1, 101.0), "top_p": (0.0, 1.5),
    "top_k": (-2, 2**31), "min_p": (2.0,), "stop": (("",),), "stop_token_ids": ((VOCAB,), tuple(range(40))),
    "seed": (2**70,), "presence_penalty": (2.5,), "frequency_penalty": (float("nan"),), "repetition_penalty": (0.0,),
    "logit_bias": ({VOCAB: 1.0}, {1: float("nan")}), "logprobs": (21,), "prompt_logprobs": (-1,),
    "allowed_token_ids": ((), (VOCAB,), (-1,)), "bad_words": (("",), (" ",), ("x",) * 1025),
    "bad_word_ids": (((),), ((1, -1),)), "truncate_prompt_tokens": (0, -2),
}  # fmt: skip


@pytest.mark.parametrize(
    ("param", "prompt", "params"),
    [
        ("prompt", [], {}),
        ("prompt", [VOCAB], {}),
        ("prompt", [-1], {}),
        ("prompt", [1] * 128, {}),
        ("max_tokens", [1] * 100, {"max_tokens": 29}),
        *((name, [1], {name: value}) for name, values in REFUSED.items() for value in values),
        ("min_tokens", [1], {"max_tokens": 1, "min_tokens": 2}),
    ],
)
def test_what_the_model_cannot_serve_is_refused_by_name(param: str, prompt: list[int], params: dict[str, Any]) -> None:
    kind = ContextLengthError if len(prompt) >= 100 else InvalidRequestError
    with pytest.raises(InvalidRequestError) as error:
        simulation.model_info(128).check(prompt, SamplingParams(**params))
    assert (type(error.value), error.value.param) == (kind, param)


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1])
def test_a_priority_is_a_32_bit_integer(priority: int) -> None:
    assert Request.make("x", [1], SamplingParams(), priority=2**31 - 1).priority == 2**31 - 1
    with pytest.raises(InvalidRequestError, match="priority must be a 32-bit integer"):
        Request.make("x", [1], SamplingParams(), priority)


def test_a_prompt_travels_as_four_bytes_a_token() -> None:
    made = Request.make("x", list(range(1000, 2000)), SamplingParams())
    sent = msgspec.msgpack.encode(made)
    assert len(sent) < len(msgspec.msgpack.encode(Request.make("x", [], SamplingParams()))) + 4004
    assert msgspec.msgpack.decode(sent, type=Request).prompt.tolist() == list(range(1000, 2000))


def test_an_id_that_is_live_and_an_unknown_grammar_are_refused() -> None:
    engine = simulated_engine()
    with pytest.raises(InvalidRequestError, match="this regex cannot be followed"):
        engine.add(request("x", [1], grammar=Grammar(kind="regex", source="unknown")))
    assert not engine.has_work
    engine.add(request("x", [1]))
    with pytest.raises(InvalidRequestError, match="'x' is running already"):
        engine.add(request("x", [2]))


def test_a_failed_step_ends_the_engine_instead_of_hanging_it() -> None:
    engine = simulated_engine()

    def explode() -> StepResult:
        raise RuntimeError("device lost")

    engine.executor.collect = explode  # type: ignore[method-assign]
    engine.add(request("x", [1], max_tokens=5))
    with pytest.raises(RuntimeError, match="device lost"):
        advance(engine)
    assert not engine.has_work
    with pytest.raises(EngineDeadError):
        engine.add(request("y", [1]))


def test_every_policy_has_a_name_on_the_command_line() -> None:
    assert tuple(POLICIES) == SCHEDULE_POLICIES


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


def test_rows_with_dear_masks_sit_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # what masks say they took counts, not a busy machine's time
    engine = simulated_engine(num_pages=400, max_seq_len=200, max_running_requests=40, max_prefill_length=400)
    engine.add(request("plain", [1], max_tokens=150, ignore_eos=True))
    engine.add(request("cheap", [2], max_tokens=150, ignore_eos=True, grammar=cycle(3, 150)))
    dear = [request(f"dear{i}", [i], max_tokens=9, ignore_eos=True, grammar=cycle(3, 9, 2)) for i in range(30)]
    for each in dear:
        engine.add(each)
    plans, events = record_plans(engine), []
    for _ in range(100):
        before = len(plans)
        events += engine.step()
        assert len(plans) == before + 1
    # None of them held another up: a token a step, but for those of the first steps, before masks were seen to be dear.
    for name in ("plain", "cheap"):
        assert len(tokens_of([event for event in events if event.id == name])) >= 90
    assert max(len(plan.constrained_slots) for plan in plans[:2]) == 31
    assert max(len(plan.constrained_slots) for plan in plans[4:]) <= 4
    events += advance(engine)
    ends = {event.id: event for event in events if event.finish}
    for each in dear:
        assert tokens_of([event for event in events if event.id == each.id]) == simulation.expected_tokens(each, 200)
    # Each in its turn: no row is done long before the last one begins.
    lasts = [index for index, event in enumerate(events) if event.finish and event.id.startswith("dear")]
    firsts = [index for index, event in enumerate(events) if event.tokens and event.id == "dear29"]
    assert firsts[3] < min(lasts)
    assert len(ends) == 32


def test_the_masks_of_all_choices_of_a_completion_share_a_budget() -> None:
    engine = simulated_engine(num_pages=400, max_seq_len=200, max_running_requests=40, max_prefill_length=400)
    names = [*(f"many-{i}" for i in range(20)), "one-0", "other"]
    events = run(
        engine, [request(name, [3], max_tokens=20, ignore_eos=True, grammar=cycle(4, 20, 20)) for name in names]
    )
    for name in names:
        last, finish = events[name][-1], FinishReason.ERROR if name.startswith("many") else FinishReason.LENGTH
        assert last.finish is finish, name
        assert ("the grammar failed: it took over 0.5 s" in (last.error or "")) == name.startswith("many")
    assert engine.cache.num_owned == 0
