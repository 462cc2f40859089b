"""What planning costs where many wait, prompts are long and the prefix tree is deep. `pytest -m soak -s` prints it.

Before requests kept their place in the tree (two shared cores): 10.2 and 193 ms a step for `lpm` with 160 prompts that
share 90,000 tokens, in one node and in 5,625; 68 ms to look for room among 64 rows over 6,250 nodes.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from helpers.simulation import instant_engine
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import Int32, StepPlan
from minisgl.core.policy import POLICIES
from minisgl.core.radix_cache import RadixCache
from minisgl.core.request_state import State
from minisgl.core.types import Request, SamplingParams

pytestmark = pytest.mark.soak


def engine_of(num_pages: int, max_seq_len: int, policy: str, budget: int, rows: int = 256) -> Engine:
    config = Config(max_running_requests=rows, max_prefill_length=budget, schedule_policy=policy)
    return instant_engine(num_pages, max_seq_len, config)


def add(engine: Engine, name: object, prompt: Int32, priority: int = 0, max_tokens: int = 7000) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request(id=str(name), prompt_bytes=prompt.tobytes(), params=params, priority=priority))


def tokens(count: int, seed: int = 0) -> Int32:
    return np.random.default_rng(seed).integers(1, 2**30, count).astype(np.int32)


def milliseconds(work: Callable[[], object], times: int = 30) -> float:
    """The median."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def shown(what: str, took: float, most: float) -> None:
    print(f"{what}: {took:.3f} ms (at most {most} ms)")
    assert took <= most


@pytest.mark.parametrize(("shared", "budget"), [(0, 8192), (90_000, 90_000), (90_000, 16)])
def test_160_long_prompts_wait_behind_one_that_does_not_fit(shared: int, budget: int) -> None:
    engine = engine_of(6760, 108_000, "lpm", budget)
    common = tokens(shared)
    add(engine, "first", np.concatenate([common, tokens(100_000 - shared, 1)]))
    while not (engine.table.state == State.DECODE).any():
        engine.step()
    for i in range(160):
        add(engine, i, np.concatenate([common, tokens(100_000 - shared, 2 + i)]))
    engine.step()
    assert engine.stats().waiting == 160
    shown(f"lpm, 160 prompts that share {shared} tokens, chunks of {budget}", milliseconds(engine.step), 1.0)


def test_a_match_through_6250_nodes() -> None:
    tree, prompt = RadixCache(16), tokens(100_000)
    node = tree.root
    for page in range(6250):
        node = tree.insert(node, prompt[16 * page : 16 * page + 16], np.array([page], np.int32))
    shown("a match through 6,250 nodes", milliseconds(lambda: tree.match(prompt)), 3.0)


def test_room_is_looked_for_among_rows_over_a_deep_tree() -> None:
    engine = engine_of(8000, 110_000, "fcfs", 16, rows=65)
    common = tokens(100_000)
    for i in range(64):
        add(engine, i, np.concatenate([common, tokens(1, i)]), 5 * (i % 2))
        while (engine.table.state != State.DECODE).sum() > 64 - i:
            engine.step()
    add(engine, "urgent", tokens(109_000, 100), 1, 10)
    engine.step()
    shown("room among 64 rows over 6,250 nodes", milliseconds(engine.step, 5), 3.0)
    assert engine.stats().retracted == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_with_256_running_and_10000_waiting(policy: str) -> None:
    engine = engine_of(40_000, 4096, policy, 8192)
    for i in range(10_256):
        add(engine, i, tokens(200, i), max_tokens=2000)
    while engine.table.free or (engine.table.state == State.PREFILL).any():
        engine.step()
    taken: list[float] = []
    schedule = engine.scheduler.schedule

    def timed() -> StepPlan | None:
        start = time.perf_counter()
        plan = schedule()
        taken.append(time.perf_counter() - start)
        return plan

    engine.scheduler.schedule = timed  # type: ignore[method-assign]
    for turn in range(60):
        if turn >= 30:
            engine.abort([engine.table.request(turn).request.id])
        engine.step()
    shown(f"{policy}, 256 running and 10,000 waiting", statistics.median(taken[:30]) * 1e3, 1.0)
    shown(f"{policy}, the same while one is replaced a step", statistics.median(taken[30:]) * 1e3, 1.0)
