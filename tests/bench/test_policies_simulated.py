"""The example policies and both evictions on 300 simulated requests: their order in TTFT and in hit rate.

Each bound lies beyond the worst of ten seeds by half of what the ten differ.
"""

import random
from functools import cache
from pathlib import Path

import numpy as np

from minisgl.config import Config
from minisgl.core.model_config import read_spec
from minisgl_bench import traffic
from minisgl_bench.cost_model import read_gpu
from minisgl_bench.metrics import RequestRecord
from minisgl_bench.simulation import Clients, Replica
from minisgl_bench.traffic import Segment, Session

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SHORTEST = f"{EXAMPLES}/srpt.py:Shortest"
DEADLINE = f"{EXAMPLES}/deadline.py:Deadline:seconds=1"
FAIR = f"{EXAMPLES}/fair.py:Fair:tokens=16"
FEW = ("system", 1)
SEED = 0


def mixed(seed: int) -> list[Session]:
    """More than the GPU can take for a while: long prompts of one application, and short ones of a quieter one."""
    rng, sessions = random.Random(seed), []
    for index in range(300):
        few = rng.random() < 0.2
        length = rng.randint(50, 800) if few else int(min(8000, rng.lognormvariate(7.2, 0.8)))
        segments = [Segment(FEW if few else ("system", 0), 16), Segment(("own", index), length)]
        sessions.append(Session((traffic.single(segments, rng.randint(5, 60)),)))
    return traffic.with_arrivals(sessions, 20.0, 0.5, seed)


def prompts_between(seed: int) -> list[Session]:
    """Each third request behind one of 8 system prompts, long prompts that never recur between them."""
    rng, sessions = random.Random(seed), []
    for index in range(300):
        segments = [Segment(("own", index), rng.randint(1000, 3000))]
        if index % 3 == 0:
            segments = [Segment(("system", rng.randrange(8)), 1024), Segment(("own", index), rng.randint(20, 200))]
        sessions.append(Session((traffic.single(segments, rng.randint(5, 40)),)))
    return traffic.with_arrivals(sessions, 6.0, 1.0, seed)


def simulated(sessions: list[Session], config: Config) -> list[RequestRecord]:
    replica = Replica(read_spec(ROOT / "benchmark/models/Qwen3-14B"), config, read_gpu("h200"))
    clients = Clients([replica], sessions)
    clients.run(lambda done: None)
    return clients.records


@cache
def ttfts(policy: str, seed: int) -> np.ndarray:
    records = simulated(mixed(seed), Config(schedule_policy=policy, max_running_requests=64))
    return np.array([record.times[0] - record.sent for record in records])


def hit_rate(eviction: str, seed: int) -> float:
    records = simulated(prompts_between(seed), Config(eviction=eviction, num_pages=1600, max_running_requests=16))
    return sum(record.cached_tokens or 0 for record in records) / sum(record.prompt_tokens for record in records)


def test_policies_in_the_order_of_their_ttft() -> None:
    base = ttfts("fcfs", SEED).mean()
    shortest, deadline, fair = (float(ttfts(policy, SEED).mean() / base) for policy in (SHORTEST, DEADLINE, FAIR))
    assert shortest < 0.59  # ten seeds: 0.39 to 0.52
    assert deadline < 0.73  # 0.51 to 0.66
    assert fair < 0.93  # 0.84 to 0.90
    assert deadline - shortest > 0.0  # 0.06 to 0.19
    assert fair - deadline > 0.10  # 0.18 to 0.35


def test_each_policy_reaches_what_it_is_for() -> None:
    sessions = mixed(SEED)
    few = np.array([session.turns[0].segments[0].key == FEW for session in sessions])
    share = np.median(ttfts(FAIR, SEED)[few]) / np.median(ttfts("fcfs", SEED)[few])
    assert share < 0.37  # ten seeds: 0.08 to 0.27
    limits = np.array([1.0 + session.turns[0].input_length / 10_000 for session in sessions])
    first, fair, deadline = (float((ttfts(policy, SEED) < limits).mean()) for policy in ("fcfs", FAIR, DEADLINE))
    assert deadline - first > 0.19  # ten seeds: 0.31 to 0.53
    assert deadline - fair > 0.08  # 0.17 to 0.35


def test_slru_keeps_what_is_used_again() -> None:
    assert hit_rate("slru", SEED) > 1.33 * hit_rate("lru", SEED)  # ten seeds: 1.53 to 1.92
