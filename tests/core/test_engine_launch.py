"""When a server launches the next step, over a device in virtual time."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest

from helpers.simulation import EOS, VOCAB, model_info
from minisgl.config import Config
from minisgl.core.engine import LEAST_SLACK, MOST_SLACK, Engine
from minisgl.core.plan import StepPlan
from minisgl.core.types import Request, SamplingParams, StepRecord, TokenEvent
from minisgl_bench.simulated_executor import SimulatedExecutor, StepSeconds, TimedExecutor

HOST, LAUNCH, DECODE = 3e-4, 2e-4, 1e-2  # s


@dataclass
class Server:
    """An engine that waits as a server does, and what it did."""

    launch_ahead: str = "just-in-time"
    overlap: bool = True
    launch: float = LAUNCH
    seconds: Callable[[StepPlan], float] = lambda plan: DECODE + 1e-5 * len(plan.prefill_tokens)
    records: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = Config(
            max_running_requests=8, max_prefill_length=64, launch_ahead=self.launch_ahead, overlap=self.overlap
        )
        exact = SimulatedExecutor(4096, config.page_size, 8, 4096, VOCAB)
        self.device = TimedExecutor(4096, VOCAB, lambda plan: StepSeconds(HOST, self.launch, self.seconds(plan)), exact)
        self.engine = Engine(self.device, model_info(4096), config, clock=lambda: self.device.now)
        self.engine.observers.append(Mock(observe=self.records.append))

    def add(self, name: str, tokens: int = 2000) -> None:
        params = SamplingParams(max_tokens=tokens, seed=1, stop_token_ids=(), ignore_eos=True)
        self.engine.add(Request.make(name, [EOS + 1, 3, 4], params))

    def run(self, until: float, arrivals: list[float] | None = None) -> dict[str, float]:
        """Steps until a time; requests arrive at others. When the first token of each came, after its arrival."""
        arrivals, first = sorted(arrivals or []), {}
        arrived: dict[str, float] = {}
        while self.device.now < until:
            self.device.now += self.engine.seconds_to_launch()
            while arrivals and arrivals[0] <= self.device.now:
                name = f"late-{len(arrived)}"
                arrived[name] = arrivals.pop(0)
                self.add(name, tokens=1)
            for event in self.engine.step():
                if event.id in arrived and event.tokens:
                    first[event.id] = self.device.now - arrived[event.id]
        return first

    @property
    def idle(self) -> list[float]:
        """Seconds that the device had nothing to do before each step."""
        spans = [record.device for record in self.records if record.device is not None]
        return [after[0] - before[1] for before, after in itertools.pairwise(spans)]


def test_a_step_is_in_the_stream_just_before_the_one_before_it_ends() -> None:
    server = Server()
    server.add("a")
    server.run(1.0)
    ahead = [
        before.device[1] - after.sent
        for before, after in zip(server.records[20:], server.records[21:], strict=False)
        if before.device is not None
    ]
    assert len(ahead) > 50
    assert all(0 < seconds < 1e-3 for seconds in ahead)
    assert max(server.idle) == 0.0


@pytest.mark.parametrize(("launch_ahead", "overlap"), [("one-step", True), ("just-in-time", False)])
def test_other_ways_never_wait(launch_ahead: str, overlap: bool) -> None:
    server = Server(launch_ahead, overlap)
    server.add("a")
    for _ in range(30):
        assert server.engine.seconds_to_launch() == 0.0
        server.engine.step()


def test_who_arrives_during_a_step_is_in_the_next() -> None:
    arrivals = [0.2 + 0.0337 * i for i in range(20)]
    means = {}
    for launch_ahead in ("just-in-time", "one-step"):
        server = Server(launch_ahead)
        server.add("a")
        first = server.run(1.0, list(arrivals))
        assert len(first) == 20
        means[launch_ahead] = sum(first.values()) / 20
    assert means["just-in-time"] < 0.75 * means["one-step"]  # a step and a half against two and a half


def test_a_device_that_becomes_faster_is_not_left_idle_for_long() -> None:
    server = Server()
    server.seconds = lambda plan: DECODE if server.device.now < 0.5 else DECODE / 2
    server.add("a")
    server.run(1.0)
    assert sum(idle > 0 for idle in server.idle) < 12
    assert max(server.idle[-40:]) == 0.0


def test_the_slack_grows_when_steps_end_early_and_is_bounded() -> None:
    server, step = Server(), 0

    def seconds(plan: StepPlan) -> float:
        nonlocal step
        step += 1
        return DECODE * (0.8 if step % 7 == 0 else 1.0)

    server.seconds = seconds
    server.add("a")
    server.run(3.0)
    timer = server.engine._timer
    assert timer is not None
    assert LEAST_SLACK <= timer._slack <= MOST_SLACK
    assert sum(server.idle[100:]) < 0.02 * 2.0


def test_steps_that_take_longer_to_launch_than_to_compute_are_not_held_back() -> None:
    steps = []
    for launch_ahead in ("just-in-time", "one-step"):
        server = Server(launch_ahead, launch=1.5 * DECODE)
        server.add("a")
        server.run(1.0)
        steps.append(len(server.records))
    assert steps[0] >= steps[1] - 3  # the first ones, until it is known


def test_tokens_are_the_same_and_each_request_ends_once() -> None:
    told: dict[str, list[TokenEvent]] = {}
    for launch_ahead in ("just-in-time", "one-step"):
        server = Server(launch_ahead)
        for name in "abcdefghij":
            server.add(name, tokens=20 + ord(name))
        events = told[launch_ahead] = []
        while server.engine.has_work:
            server.device.now += server.engine.seconds_to_launch()
            events += server.engine.step()
    tokens = [
        {name: [t for event in events if event.id == name for t in event.tokens] for name in "abcdefghij"}
        for events in told.values()
    ]
    assert tokens[0] == tokens[1]
    assert all(len(each) > 100 for each in tokens[0].values())
    assert all(sum(event.finish is not None for event in events) == 10 for events in told.values())
