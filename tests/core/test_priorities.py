"""Who goes first and who gives way, over the simulated device."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.retract import check_promises
from helpers.simulation import advance, check_answers, record_plans, request, simulated_engine
from minisgl.core.engine import Engine
from minisgl.core.policy import POLICIES
from minisgl.core.request_state import RequestState
from minisgl.core.types import FinishReason, Request


def asked(name: str, priority: int, prompt: int = 8, max_tokens: int = 20) -> Request:
    """A request that runs to its length."""
    tokens = [len(name) + ord(name[0]) % 40] * prompt
    return request(name, tokens, priority, max_tokens=max_tokens, ignore_eos=True)


def running(engine: Engine) -> str:
    """Names of the requests that have a row, sorted."""
    return "".join(sorted(name for name, entry in engine.scheduler.live.items() if entry.slot >= 0))


def finish(engine: Engine) -> list[str]:
    """Run to the end; names in the order in which they ended."""
    return [event.id for event in advance(engine) if event.finish is FinishReason.LENGTH]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_lowest_number_is_admitted_first_and_of_equals_the_oldest(policy: str) -> None:
    engine = simulated_engine(max_running_requests=1, schedule_policy=policy)
    for name, priority in zip("abcdef", (0, 2, 0, -1, 2, -5), strict=True):
        engine.add(asked(name, priority))
    assert finish(engine) == list("fdacbe")
    assert engine.stats().retracted == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_a_better_priority_takes_the_row_of_the_worst_and_youngest(overlap: bool) -> None:
    engine = simulated_engine(max_running_requests=3, overlap=overlap)
    wanted = [asked(name, priority) for name, priority in zip("abcd", (1, 2, 2, 0), strict=True)]
    for r in wanted[:3]:
        engine.add(r)
    events = advance(engine, 5)
    assert running(engine) == "abc"
    engine.add(wanted[3])
    events += advance(engine, 1)
    assert running(engine) == "abd"
    assert engine.stats().retracted == 1
    events += advance(engine)
    check_answers(engine, wanted, {r.id: [event for event in events if event.id == r.id] for r in wanted})
    assert engine.stats().retracted == 1


def test_a_row_that_is_about_to_leave_is_room_enough() -> None:
    engine = simulated_engine(max_running_requests=2)
    for name in "ab":
        engine.add(asked(name, 1))
    engine.step()
    engine.abort("b")
    engine.add(asked("c", 0))
    assert finish(engine) == list("ac")
    assert engine.stats().retracted == 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("worst", "wanted", "after"), [(0, 30, "ab"), (5, 22, "bc")])
def test_pages_are_taken_from_worse_priorities_only_if_that_makes_room(
    overlap: bool, worst: int, wanted: int, after: str
) -> None:
    """10 pages: `a` fills 6 and more, `b` holds 2; `c` needs 8 or 6, and a page for each that runs."""
    engine = simulated_engine(num_pages=10, page_size=4, max_seq_len=40, overlap=overlap, max_prefill_length=64)
    engine.add(asked("a", worst, prompt=22, max_tokens=12))
    engine.add(asked("b", 2, prompt=5, max_tokens=10))
    advance(engine, 3)
    assert running(engine) == "ab"
    engine.add(asked("c", 1, prompt=wanted, max_tokens=4))
    advance(engine, 2)
    assert running(engine) == after
    assert engine.stats().retracted == (after == "bc")
    ends = finish(engine)
    assert ends[-1] == "a" if after == "bc" else ends[0] in "ab"


@pytest.mark.parametrize("other", [[1] * 20, [2] * 20])
def test_pages_that_others_hold_too_are_no_room(other: list[int]) -> None:
    """8 pages: `a` and `b` share 5 and own 1 each; `c` wants 7, of which it may find 5, and one for each that runs."""

    def sharing(name: str, prompt: list[int], priority: int) -> Request:
        return request(name, [*prompt, ord(name) % 40], priority, max_tokens=3, ignore_eos=True)

    engine = simulated_engine(num_pages=8, page_size=4, max_seq_len=32, overlap=False, max_prefill_length=64)
    engine.add(sharing("a", [1] * 20, 0))
    engine.add(sharing("b", [1] * 20, 5))
    engine.step()
    assert running(engine) == "ab"
    engine.add(sharing("c", [*other, 3, 3, 3, 3, 3, 3, 3, 3], 1))
    engine.step()
    assert engine.stats().retracted == 0, "without b there would be one page more"
    assert finish(engine) == list("abc")


@given(
    prompts=st.lists(st.tuples(st.integers(0, 24), st.integers(1, 16), st.integers(0, 3)), min_size=2, max_size=12),
    pages=st.integers(10, 24),
    rows=st.integers(1, 6),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_who_is_retracted_for_another_makes_room_for_it(
    prompts: list[tuple[int, int, int]], pages: int, rows: int
) -> None:
    engine = simulated_engine(
        num_pages=pages, page_size=4, max_seq_len=40, overlap=False, max_prefill_length=4096, max_running_requests=rows
    )
    check_promises(engine)
    for number, (shared, own, priority) in enumerate(prompts):
        prompt = [*range(shared), *([number] * own)][:36]
        engine.add(request(str(number), prompt, priority, max_tokens=4, ignore_eos=True))
        engine.step()
    finish(engine)


@pytest.mark.parametrize(("priorities", "order"), [((3, 1, 2, 0), "dbca"), ((0, 0, 0, 0), "abcd")])
def test_pages_running_out_retract_the_worst_and_youngest(priorities: tuple[int, ...], order: str) -> None:
    engine = simulated_engine(num_pages=24, page_size=4, max_seq_len=96, cache="naive", overlap=False)
    for name, priority in zip("abcd", priorities, strict=True):
        engine.add(asked(name, priority, max_tokens=40))
    ends, away = [], set()
    while engine.has_work:
        ends += [event.id for event in engine.step() if event.finish]
        away |= {entry.request.id for entry in engine.scheduler.waiting}
    assert engine.stats().retracted > 0
    assert order[-1] in away
    assert order[0] not in away
    assert ends == list(order)


def test_a_flood_of_better_ones_displaces_each_row_once() -> None:
    engine = simulated_engine(max_running_requests=4, num_pages=128)
    for name in "abcd":
        engine.add(asked(name, 1, max_tokens=60))
    advance(engine, 3)
    for name in "klmnopqr":
        engine.add(asked(name, 0))
    ends = finish(engine)
    assert sorted(ends[:8]) == list("klmnopqr")
    assert engine.stats().retracted == 4


def test_eight_equal_prompts_are_computed_once() -> None:
    """Even in their first step: the others compute only what is behind the last whole page."""
    engine = simulated_engine(num_pages=64, page_size=4, max_prefill_length=8192)
    plans = record_plans(engine)
    for i in range(8):
        engine.add(request(str(i), list(range(41)), max_tokens=3, temperature=0.8, seed=i))
    cached = {event.id: event.cached_tokens for _ in range(4) for event in engine.step() if event.tokens}
    assert cached == {str(i): 40 if i else 0 for i in range(8)}
    assert sum(len(plan.prefill_tokens) for plan in plans) == 41 + 7
    assert engine.cache.num_cached == 10


def test_stats_count_aborts_and_waiting_prompts() -> None:
    engine = simulated_engine(max_running_requests=1)
    for name, length in zip("abc", (3, 5, 7), strict=True):
        engine.add(asked(name, 0, prompt=length))
    engine.step()
    assert (engine.stats().waiting, engine.stats().waiting_tokens) == (2, 12)
    engine.abort(["a", "b", "unknown", "b"])
    assert engine.stats().aborted == 2
    assert engine.stats().waiting_tokens == 7
    finish(engine)
    assert (engine.stats().aborted, engine.stats().waiting_tokens) == (2, 0)


def test_aborting_thousands_of_waiting_requests_does_not_search_the_queue_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = simulated_engine(max_running_requests=1)
    names = [str(i) for i in range(2000)]
    for i, name in enumerate(names):
        engine.add(asked(name, i % 3, prompt=1))
    compared = 0

    def equal(self: RequestState, other: object) -> bool:
        nonlocal compared
        compared += 1
        return self is other

    monkeypatch.setattr(RequestState, "__eq__", equal)
    engine.abort([name for name in reversed(names) if name not in ("5", "3", "1000")])
    assert compared < 20 * len(names)
    assert finish(engine) == ["3", "1000", "5"]
