"""Policies, shipped ones and those of a user's file: their order by steps, what is wrong with them, what they cost."""

import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from helpers.retract import check_promises
from helpers.simulation import advance, check_answers, record_plans, request, run, simulated_engine
from minisgl import plugins
from minisgl.core.engine import Engine
from minisgl.core.policy import POLICIES, LongestPrefixMatch, Policy, View
from minisgl.core.radix_cache import EVICTIONS, SegmentedLRU
from minisgl.core.request_state import RequestState, State
from minisgl.core.types import Request
from minisgl.errors import ConfigError
from minisgl.plugins import GuardedEviction, load_eviction, load_policy

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE_POLICIES = [f"{EXAMPLES / name}" for name in ("srpt.py:Shortest", "fair.py:Fair", "deadline.py:Deadline")]
POLICY_FILE = """
from minisgl.core.policy import Policy
from minisgl.core.radix_cache import EvictionPolicy
"""


def asked(name: str, length: int, priority: int = 0, max_tokens: int = 4, first: int = 0) -> Request:
    """A request whose prompt is its own from the token `first` on, and which runs to its length."""
    prompt = [*range(first), *([ord(name[0]) % 40 + 1] * (length - first))]
    return request(name, prompt, priority, max_tokens=max_tokens, ignore_eos=True)


def policy_engine(policy: str, clock: Iterator[float] | None = None, **settings: object) -> Engine:
    defaults: dict[str, object] = {"num_pages": 400, "max_seq_len": 400, "max_prefill_length": 64}
    engine = simulated_engine(**{**defaults, **settings, "schedule_policy": policy})  # type: ignore[arg-type]
    if clock is not None:
        engine.clock = lambda: next(clock)
    engine.scheduler.policy.strict = True
    return engine


def first_tokens(engine: Engine) -> list[str]:
    """Names in the order of their first tokens, running to the end."""
    named: dict[str, None] = {}
    for event in advance(engine):
        if event.tokens:
            named.setdefault(event.id)
    return list(named)


# The order of first tokens. One row; each is a name, seconds before now, prompt tokens, of which are cached, priority.
ORDERS: list[tuple[str, list[tuple[str, float, int, int, int]], str]] = [
    ("fcfs", [("a", 9, 80, 0, 0), ("b", 8, 8, 0, 0), ("c", 7, 80, 64, 0)], "abc"),
    ("fcfs", [("a", 9, 80, 0, 1), ("b", 8, 8, 0, 0), ("c", 7, 80, 64, -1)], "cba"),
    ("lpm", [("a", 9, 80, 0, 0), ("b", 8, 8, 0, 0), ("c", 7, 80, 64, 0)], "cab"),
    ("lpm", [("a", 9, 80, 0, 0), ("b", 8, 80, 64, 0), ("c", 7, 80, 32, 0), ("d", 7, 8, 4, 1)], "bcad"),
    ("lpm:patience=2", [("a", 9, 80, 0, 0), ("b", 8, 80, 64, 0), ("c", 7, 80, 32, 0)], "bac"),
    ("lpm:patience=0", [("a", 9, 80, 0, 0), ("b", 8, 80, 64, 0), ("c", 7, 80, 76, 0)], "abc"),
    ("lpm", [("a", 90, 80, 0, 0), ("b", 8, 80, 76, 0), ("c", 7, 80, 64, 0)], "abc"),
    ("srpf", [("a", 9, 80, 0, 0), ("b", 9, 8, 0, 0), ("c", 9, 80, 76, 0), ("d", 9, 60, 0, 0)], "cbda"),
    ("srpf", [("a", 9.1, 80, 0, 0), ("b", 9, 8, 0, 0), ("c", 9, 80, 76, 1)], "abc"),
    ("srpf:aging=1", [("a", 99, 80, 0, 0), ("b", 9, 8, 0, 0)], "ab"),
    ("srpf:aging=0", [("a", 99, 80, 0, 0), ("b", 9, 8, 0, 0)], "ba"),
    ("priority", [("a", 9, 8, 0, 2), ("b", 8, 8, 0, 1), ("c", 7, 8, 0, 0)], "cba"),
    ("priority", [("a", 150, 8, 0, 2), ("b", 8, 8, 0, 1), ("c", 7, 8, 0, 0)], "acb"),
    ("priority:aging=0", [("a", 150, 8, 0, 2), ("b", 8, 8, 0, 1), ("c", 7, 8, 0, 0)], "cba"),
    (EXAMPLE_POLICIES[0], [("a", 9, 80, 0, 0), ("b", 9, 8, 0, 0), ("c", 9, 60, 0, 0)], "bca"),
    (EXAMPLE_POLICIES[2], [("a", 1, 300, 0, 0), ("b", 1, 8, 0, 0), ("c", 1.5, 8, 0, 0)], "cba"),
    (EXAMPLE_POLICIES[2], [("a", 5, 8, 0, 0), ("b", 1, 80, 0, 0), ("c", 99, 8, 0, 0)], "cba"),
]


@pytest.mark.parametrize(("policy", "prompts", "order"), ORDERS)
def test_whose_prompt_is_computed_next(
    policy: str, prompts: list[tuple[str, float, int, int, int]], order: str
) -> None:
    now = 1000.0
    engine = policy_engine(policy, iter(lambda: now, None), max_running_requests=1, max_prefill_length=400)
    run(engine, [request("warm", range(100), max_tokens=1)])
    for name, age, length, cached, priority in prompts:
        now = 1000.0 - age
        engine.add(asked(name, length, priority, first=cached))
    now = 1000.0
    assert "".join(first_tokens(engine)) == order
    assert engine.stats().retracted == 0


@pytest.mark.parametrize("policy", [*POLICIES, "lpm:patience=3", *EXAMPLE_POLICIES])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_every_policy_serves_all_and_changes_no_token(policy: str, eviction: str) -> None:
    """Under pressure: 40 requests, 4 rows, few pages, three groups that share a prefix."""
    engine = policy_engine(policy, num_pages=40, max_seq_len=100, max_running_requests=4, eviction=eviction)
    wanted = [
        request(str(i), [*range(i % 3, 20 + i % 3), *([i] * (1 + 7 * i % 40))], i % 2, max_tokens=3 + i % 30, seed=i)
        for i in range(40)
    ]
    check_answers(engine, wanted, run(engine, wanted))


@pytest.mark.parametrize("budget", [8192, 512])
def test_an_urgent_prompt_is_admitted_while_a_long_one_of_worse_priority_is_computed(budget: int) -> None:
    """Its first token comes with the next step, and the long one goes on beside it."""
    engine = simulated_engine(num_pages=8000, max_seq_len=121_000, page_size=16, max_prefill_length=budget)
    engine.executor._next = lambda slot: 1  # type: ignore[attr-defined]  # a hash of so long a prefix takes its time
    plans = record_plans(engine)
    engine.add(request("long", [1] * 120_000, 5, max_tokens=2))
    advance(engine, 1)
    engine.add(request("urgent", [2] * 100, 0, max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.scheduler.live["urgent"].slot >= 0
    assert plans[-1].prefill_lens.tolist() == [100, budget - 100]


def test_room_is_made_for_the_request_that_the_policy_admits_next() -> None:
    """`old` waits for longer and needs many pages, `hit` is cached: nothing is retracted for `old` while `hit` fits."""
    engine = policy_engine("lpm", num_pages=30, max_seq_len=100, max_running_requests=4, overlap=False)
    run(engine, [request("warm", range(40), max_tokens=1)])
    engine.add(asked("running", 40, 5, max_tokens=40))
    advance(engine, 2)
    engine.add(asked("old", 60, 0, max_tokens=2))
    engine.add(request("hit", [*range(40), 1], max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.scheduler.live["hit"].slot >= 0
    assert engine.stats().retracted == 0


@pytest.mark.parametrize("policy", [*POLICIES, *EXAMPLE_POLICIES])
@pytest.mark.parametrize("overlap", [True, False])
def test_who_is_retracted_makes_room_for_a_request_that_is_then_admitted(policy: str, overlap: bool) -> None:
    for seed in range(8):
        engine = policy_engine(policy, num_pages=40, max_seq_len=100, max_running_requests=4, overlap=overlap)
        check_promises(engine)
        for i in range(16):
            length = 1 + (seed * 7 + i * 13) % 70
            name, first = chr(97 + i), min(length - 1, 8 * (i % 4))
            engine.add(asked(name, length, (seed + i) % 3, max_tokens=5 + i, first=first))
            advance(engine, i % 3)
        advance(engine)


@pytest.mark.parametrize("policy", ["fcfs", "srpf"])
def test_a_row_that_needs_no_page_decodes_in_every_step(policy: str) -> None:
    """Over many runs whose pages run short: others wait for the pages of a row that leaves, it does not."""
    for seed in range(60):
        engine = policy_engine(policy, num_pages=12 + seed % 7, max_seq_len=48, cache="naive", max_running_requests=6)
        table, cache = engine.table, engine.cache
        for i in range(12):
            engine.add(asked(chr(97 + i), 1 + (seed * 5 + i * 3) % 14, 0, max_tokens=6 + (seed + i) % 17))
        plans = record_plans(engine)
        while engine.has_work:
            decoding = table.rows_in(State.DECODE)
            ready = decoding[cache.pages_needed(decoding, table.num_computed_tokens[decoding] + 1) == 0]
            requests = {slot: table.requests[slot] for slot in ready.tolist()}
            before, count = table.num_computed_tokens[ready].copy(), len(plans)
            engine.step()
            for slot, computed in zip(ready.tolist(), before.tolist(), strict=True):
                if len(plans) > count and table.requests[slot] is requests[slot] and table.state[slot] == State.DECODE:
                    assert table.num_computed_tokens[slot] == computed + 1


def test_fair_shares_let_no_flood_pass() -> None:
    """20 requests of one group and 2 of another, two rows: the two are not behind the twenty."""
    order = {}
    for policy in ("fcfs", EXAMPLE_POLICIES[1]):
        engine = policy_engine(policy, max_running_requests=2)
        for i in range(20):
            engine.add(request(f"flood{i}", [1] * 20 + [i], max_tokens=4, ignore_eos=True))
        for i in range(2):
            engine.add(request(f"other{i}", [2] * 20 + [i], max_tokens=4, ignore_eos=True))
        order[policy] = first_tokens(engine)
    ends = {policy: [names.index(f"other{i}") for i in range(2)] for policy, names in order.items()}
    assert ends["fcfs"] == [20, 21]
    assert max(ends[EXAMPLE_POLICIES[1]]) <= 4


def test_slru_keeps_the_prompts_that_come_again_where_lru_drops_them() -> None:
    """In each of 8 turns two prompts come twice, then 12 others, in pages for 11. Of 16 tokens 12 can be cached."""
    cached = {}
    for eviction in EVICTIONS:
        engine = policy_engine("fcfs", num_pages=44, max_seq_len=64, max_running_requests=1, eviction=eviction)
        engine.clock = itertools.count(1000.0).__next__
        prompts = [[40 + i] * 16 if i < 2 else [turn, i] * 8 for turn in range(8) for i in (0, 0, 1, 1, *range(2, 14))]
        answers = run(engine, [request(str(i), prompt, max_tokens=1) for i, prompt in enumerate(prompts)])
        cached[eviction] = sum(event.cached_tokens for events in answers.values() for event in events)
    assert cached["lru"] == 8 * 2 * 12
    assert cached["slru"] == (8 + 7) * 2 * 12


@pytest.mark.parametrize("policy", [*POLICIES, *EXAMPLE_POLICIES])
def test_a_step_looks_at_few_of_many_waiting_requests(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 wait and 8 run. No step asks the cache for more than some hundreds of them, nor walks a prefix twice."""
    engine = policy_engine(policy, max_running_requests=8)
    for i in range(10_000):
        engine.add(request(str(i), [i % 40, i % 31, i % 17, 1, 2, 3, 4, 5], max_tokens=50, ignore_eos=True))
    advance(engine, 4)
    looked_up = Mock(wraps=engine.cache.match)
    walks = Mock(wraps=engine.cache.tree._descend)
    monkeypatch.setattr(engine.cache, "match", looked_up)
    monkeypatch.setattr(engine.cache.tree, "_descend", walks)
    for _ in range(10):
        engine.step()
    assert looked_up.call_count <= 10 * 2 * 130
    assert walks.call_count <= 10 * 130


ORDER = "class Mine(Policy):\n  def order(self, requests, view)"
BAD_POLICIES = {
    "raises on import": ("1 / 0\n", "ZeroDivisionError: division by zero (line 4)"),
    "is no Python": ("class Mine(Policy:\n", "SyntaxError"),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "has another class": ("class Other(Policy): pass\n", "it has no class 'Mine'"),
    "is no policy": ("class Mine: pass\n", "it is no subclass of minisgl.core.policy.Policy"),
    "is a function": ("def Mine(): return Policy()\n", "it is no subclass of minisgl.core.policy.Policy"),
    "raises when made": ("class Mine(Policy):\n  def __init__(self): raise OSError('no')\n", "OSError: no (line 5)"),
    "takes other parameters": ("class Mine(Policy):\n  def __init__(self, *, a): pass\n", "it needs a value for a"),
    "raises in key": ("class Mine(Policy):\n  def key(self, request): return 1 / 0\n", "(line 5)"),
    "has a key of text": ("class Mine(Policy):\n  def key(self, request): return 'a'\n", "its key 'a' is neither"),
    "has no key": ("class Mine(Policy):\n  def key(self, request): return float('nan')\n", "its key nan is neither"),
    "raises in order": (f"{ORDER}: raise KeyError(1)\n", "KeyError: 1"),
    "raises halfway": (f"{ORDER}:\n    yield from ()\n    1 / 0\n", "(line 7)"),
    "has too few arguments": ("class Mine(Policy):\n  def order(self, requests): return requests\n", "TypeError"),
    "returns nothing": (f"{ORDER}: pass\n", "NoneType"),
    "returns names": (f"{ORDER}: return ['a']\n", "it returned 'a'"),
    "returns one for ever": (
        "import itertools\nclass Mine(Policy):\n  def order(self, requests, view):\n"
        "    return itertools.repeat(next(iter(requests)))\n",
        "it returned request",
    ),
    "returns running ones": (f"{ORDER}: return view.running + list(requests)\n", "it returned request"),
    "returns ended ones": (
        "class Mine(Policy):\n  def __init__(self): self.seen = {}\n  def order(self, requests, view):\n"
        "    self.seen |= dict.fromkeys(requests)\n    return list(self.seen)\n",
        "it returned request",
    ),
    "retracts waiting ones": (
        f"{ORDER}:\n    self.all = list(requests)\n    return self.all\n"
        "  def retract(self, running, view): return self.all\n",
        "it returned request",
    ),
    "lets each retract the other": (
        "class Mine(Policy):\n  def make_room(self, waiting, running, view): return running\n"
        "  def order(self, requests, view): return sorted(requests, key=lambda r: r.slot >= 0)\n",
        "had not ended after",
    ),
    "starves all": (f"{ORDER}: return ()\n", "24 of 24 requests had not ended"),
    "does not return": (f"{ORDER}:\n    while True: pass\n", "does not return"),
    "hangs on import": ("while True: pass\n", "does not return"),
}  # fmt: skip
KEY = "class Mine(EvictionPolicy):\n  def key(self, node): return"
BAD_EVICTIONS = {
    "eviction: fails": (f"{KEY} 1 / 0\n", "ZeroDivisionError: division by zero (line 5)"),
    "eviction: no key": (f"{KEY} None\n", "TypeError"),
    "eviction: no number": (f"{KEY} float('nan')\n", "the key is not a number"),
    "eviction: another class": ("class Mine: pass\n", "is no subclass of minisgl.core.radix_cache.EvictionPolicy"),
}


@pytest.mark.parametrize("what", [*BAD_POLICIES, *BAD_EVICTIONS])
def test_a_bad_policy_is_an_error_that_names_the_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = {**BAD_POLICIES, **BAD_EVICTIONS}[what]
    if message == "does not return":
        monkeypatch.setattr(plugins, "TRIAL_SECONDS", 0.3)
    path = tmp_path / "mine.py"
    path.write_text(POLICY_FILE + text)
    with pytest.raises(ConfigError) as error:
        (load_eviction if what in BAD_EVICTIONS else load_policy)(f"{path}:Mine")
    assert str(path) in error.value.message
    assert message in error.value.message
    assert "\n" not in error.value.message
    for thread in threading.enumerate():
        if thread.name.startswith("trial of"):
            thread.join(10)
            assert not thread.is_alive(), "it still computes"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:Mine", "FileNotFoundError"),
        ("nowhere.py", "FileNotFoundError"),
        ("lpm:patience", "a parameter is written name=value, not 'patience'"),
        ("lpm:patienc=5", "it has no parameter patienc: it takes patience"),
        ("lpm:patience=soon", "patience takes a number, not 'soon'"),
        ("lpm:patience=null", "patience takes a number, not 'null'"),
        ("srpf:aging=", "aging takes a number, not ''"),
        ("fcfs:a=1", "it has no parameter a: it takes none"),
        ("other", "it is none of fcfs, lpm, srpf, priority, no entry point of minisgl.policies, and no path.py:Class"),
    ],
)
def test_what_names_no_policy_is_an_error_that_says_so(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_policy(spec)
    assert error.value.message.startswith(f"the policy {spec} cannot be used: ")
    assert message in error.value.message


def test_a_policy_that_lacks_a_parameter_says_which(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    init = "  def __init__(self, weight, *, share, aging=1.0): ...\n"
    path.write_text(f"{POLICY_FILE}class Mine(Policy):\n{init}")
    load_policy(f"{path}:Mine:share=0.5:weight=text")
    with pytest.raises(ConfigError, match="cannot be used: it needs a value for weight, share"):
        load_policy(f"{path}:Mine:aging=2")
    with pytest.raises(ConfigError, match="it has no parameter a: it takes weight, share, aging"):
        load_policy(f"{path}:Mine:a=2")


def test_parameters_are_numbers_where_they_look_like_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    init = "  def __init__(self, **given): self.given = given\n"
    path.write_text(f"{POLICY_FILE}class Mine(Policy):\n{init}")
    policy = load_policy(f"{path}:Mine:a=5:b=0.5:c=true:d=text:e=")
    assert policy.given == {"a": 5, "b": 0.5, "c": True, "d": "text", "e": ""}  # type: ignore[attr-defined]
    shipped, eviction = load_policy("lpm:patience=5"), load_eviction("slru:protect=2")
    assert isinstance(shipped, LongestPrefixMatch)
    assert shipped.patience == 5
    assert isinstance(eviction, GuardedEviction)
    assert isinstance(eviction.policy, SegmentedLRU)
    assert eviction.policy.protect == 2


def test_an_entry_point_names_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("mine", "minisgl.core.policy:LongestPrefixMatch", "minisgl.policies")]
    monkeypatch.setattr(plugins, "entry_points", lambda group, name: found if group == "minisgl.policies" else [])
    policy = load_policy("mine:patience=3")
    assert isinstance(policy, LongestPrefixMatch)
    assert policy.patience == 3


@pytest.mark.parametrize("hook", ["key", "order", "retract", "make_room"])
@pytest.mark.parametrize("wrong", [KeyError("gone"), SystemExit(3), "a", [1], None, "twice", "all"])
def test_a_policy_that_fails_while_serving_is_replaced(
    hook: str, wrong: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After five good answers of a policy that puts the youngest first; nothing is lost, and fcfs goes on."""
    asked_for = itertools.count()

    class Mine(Policy):
        def key(self, request: RequestState) -> float:
            return -request.arrival

        def retract(self, running: Sequence[RequestState], view: View) -> Iterable[RequestState]:
            return list(running)

    good = getattr(Mine, hook)

    def failing(self: Policy, *given: Any) -> object:
        answer = good(self, *given)
        if next(asked_for) < 5:
            return answer
        if isinstance(wrong, BaseException):
            raise wrong
        twice = list(answer) * 2 if hook != "key" else []
        everyone = [*engine.scheduler.live.values()] * 2
        return {"twice": twice or "no", "all": everyone or None}.get(str(wrong), wrong)

    engine = policy_engine("fcfs", num_pages=30, max_seq_len=100, max_running_requests=3, max_prefill_length=16)
    monkeypatch.setattr(Mine, hook, failing)
    engine.scheduler.policy.policy, engine.scheduler.policy.strict = Mine(), False
    wanted = [asked(chr(97 + i), 6 + i, i % 3, max_tokens=20) for i in range(20)]
    for one in wanted[:8]:
        engine.add(one)
    events = advance(engine, 12)
    for one in wanted[8:]:
        engine.add(one)
        events += advance(engine, 1)
    if hook == "make_room" and wrong == "twice":
        wanted.append(asked("z", 60, -1, max_tokens=20))
        engine.add(wanted[-1])
    names = [one.id for one in wanted]
    waiting = [r.sort_key for r in engine.scheduler.waiting]
    assert waiting == sorted(waiting)
    events += advance(engine)
    assert "the scheduling policy Mine failed; fcfs takes its place" in caplog.text
    assert type(engine.scheduler.policy.policy) is Policy
    check_answers(engine, wanted, {name: [event for event in events if event.id == name] for name in names})


@pytest.mark.parametrize("flag", ["policy", "eviction"])
def test_the_recipe_of_the_contributors_page_works(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (EXAMPLES.parent / "CONTRIBUTING.md").read_text()
    text, spec = re.findall(rf"```python\n(# mine.py, run with --{flag} (\S+)\n.*?)```", page, re.DOTALL)[0]
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    engine = simulated_engine(**{"schedule_policy" if flag == "policy" else "eviction": spec})
    run(engine, [asked(chr(97 + i), 1 + i, max_tokens=9) for i in range(20)])
    assert engine.stats().running == engine.stats().waiting == 0
