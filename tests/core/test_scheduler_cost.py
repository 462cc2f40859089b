"""What planning costs where many wait, prompts are long and the prefix tree is deep, in calls of functions.

The calls of a step must not become more with the length of the queue, nor with the depth of the tree.
"""

import numpy as np
import pytest

from helpers.simulation import calls, calls_of_a_step, instant_engine
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import Int32
from minisgl.core.policy import POLICIES
from minisgl.core.radix_cache import Node, RadixCache
from minisgl.core.request_state import State
from minisgl.core.types import Request, SamplingParams

MARGIN = 10  # calls of the interpreter's own


def engine_of(num_pages: int, policy: str, budget: int, rows: int = 64) -> Engine:
    config = Config(max_running_requests=rows, max_prefill_length=budget, schedule_policy=policy)
    return instant_engine(num_pages, num_pages * config.page_size, config)


def add(engine: Engine, name: object, prompt: Int32, priority: int = 0) -> None:
    params = SamplingParams(max_tokens=2000, ignore_eos=True)
    engine.add(Request(id=str(name), prompt_bytes=prompt.tobytes(), params=params, priority=priority))


def tokens(count: int, seed: int = 0) -> Int32:
    return np.random.default_rng(seed).integers(1, 2**30, count).astype(np.int32)


@pytest.mark.parametrize("chunk", [16, 16_000])
def test_prompts_that_wait_are_not_compared_with_the_tree_again(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    descend = RadixCache._descend

    def counted(tree: RadixCache, node: Node, rest: Int32) -> Node:
        compared.append(len(rest))
        return descend(tree, node, rest)

    monkeypatch.setattr(RadixCache, "_descend", counted)
    found = []
    for shared in (800, 16_000):
        engine, common = engine_of(1160, "lpm", chunk), tokens(shared)
        add(engine, "first", np.concatenate([common, tokens(18_000 - shared, 1)]))
        while not (engine.table.state == State.DECODE).any():
            engine.step()
        for i in range(100):
            add(engine, i, np.concatenate([common, tokens(18_000 - shared, 2 + i)]))
        engine.step()
        assert compared
        compared.clear()
        found.append(calls_of_a_step(engine))
        assert engine.stats().waiting == 100
        assert not compared
    assert found[1] <= found[0] + MARGIN


def test_a_match_takes_few_calls_a_node() -> None:
    found = []
    for nodes in (10, 1000):
        tree, prompt = RadixCache(16), tokens(16 * nodes)
        node = tree.root
        for page in range(nodes):
            node = tree.insert(node, prompt[16 * page : 16 * page + 16], np.array([page], np.int32))
        found.append(calls(tree.match, prompt))
    assert found[1] - found[0] <= 5 * 990


def test_room_is_looked_for_among_rows_over_a_deep_tree() -> None:
    found = []
    for depth in (100, 1000):
        engine, common = engine_of(depth + 600, "fcfs", 16, rows=65), tokens(16 * depth)
        for i in range(64):
            add(engine, i, np.concatenate([common, tokens(1, i)]), 5 * (i % 2))
            while (engine.table.state != State.DECODE).sum() > 64 - i:
                engine.step()
        add(engine, "urgent", tokens(16 * (depth + 500), 100), 1)
        engine.step()
        found.append(calls_of_a_step(engine, 5))
        assert engine.stats().retracted == 0
    assert found[1] <= found[0] + MARGIN


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_does_not_look_at_all_who_wait(policy: str) -> None:
    found = []
    for waiting in (500, 5000):
        engine = engine_of(10_000, policy, 8192)
        for i in range(64 + waiting):
            add(engine, i, tokens(20, i))
        while engine.table.free or (engine.table.state == State.PREFILL).any():
            engine.step()
        found.append([calls_of_a_step(engine), calls(replace_one, engine)])
    for few, many in zip(*found, strict=True):
        assert many <= few + MARGIN


def replace_one(engine: Engine) -> None:
    engine.abort([engine.table.request(0).request.id])
    engine.step()
