"""Some steps of a run are traced, and stand for all of them."""

from __future__ import annotations

import itertools

import pytest

from helpers.simulation import simulated_engine
from minisgl.bench.profile import PARTS, STRETCHES, TRACED, Traced, Tracer, account, profile, sample_steps, split
from minisgl.bench.steps import Recorder, Step, full_decodes, step_figures
from minisgl.bench.trace import Activity
from minisgl.core.engine import Engine
from minisgl.core.plan import StepPlan
from minisgl.core.types import Request, SamplingParams

PREFILL, DECODE = Step(0, 64, 1), Step(4, 0, 4)
KERNEL = 1e-3
IDLE = 1e-4


def serve(engine: Engine, requests: int = 5, tokens: int = 40) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
    for index in range(requests):
        engine.add(Request(id=str(index), prompt=[index + 1] * 24, params=params))
    while engine.has_work:
        engine.step()


class FakeDevice:
    """A profiler over launches: each step takes KERNEL in a product, then IDLE, and a copy back if it samples."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.timeline: list[Activity] | None = None

    def start(self) -> None:
        assert self.timeline is None
        self.timeline = []

    def stop(self) -> list[Activity]:
        assert self.timeline is not None
        timeline, self.timeline = self.timeline, None
        return timeline

    def see(self, plan: StepPlan) -> None:
        self._take("kernel", "gemm", KERNEL)
        self.clock += IDLE
        if len(plan.sampled_slots):
            self._take("gpu_memcpy", "Memcpy DtoH", 0.0)

    def _take(self, category: str, name: str, seconds: float) -> None:
        if self.timeline is not None:
            self.timeline.append(Activity(self.clock, self.clock + seconds, category, name))
        self.clock += seconds


class Device(Recorder):
    """A recorder that tells the fake device what is launched."""

    fake: FakeDevice

    def launch(self, plan: StepPlan) -> None:
        self.fake.see(plan)
        super().launch(plan)


def test_every_step_is_stood_for_once() -> None:
    steps = [PREFILL] * 18 + [DECODE] * 1000
    weights = sample_steps(steps)
    assert sum(weights[index] for index in weights if index < 18) == pytest.approx(18)
    assert sum(weights[index] for index in weights if index >= 18) == pytest.approx(1000)
    assert len(weights) == 18 + STRETCHES[True] * TRACED
    assert sample_steps([DECODE]) == {0: 1.0}
    assert sample_steps([]) == {}


def test_a_traced_run_is_split_as_the_whole_run_is() -> None:
    recorded = simulated_engine()
    recorder = Recorder(recorded.executor)
    recorded.executor = recorder
    serve(recorded, tokens=100)
    steps = recorder.steps
    again, fake = simulated_engine(), FakeDevice()
    device = Device(again.executor)
    device.fake = fake

    def run(tracer: Tracer) -> None:
        again.executor = tracer
        serve(again, tokens=100)

    result = profile(device, steps, run, fake)
    decodes = sum(step.decodes_only for step in steps)
    assert device.steps == steps
    assert result.seconds["matrix products"] == pytest.approx(decodes * KERNEL)
    assert result.seconds["prefill"] == pytest.approx((len(steps) - decodes) * KERNEL)
    assert result.seconds["host"] == pytest.approx(len(steps) * IDLE, rel=0.1)
    assert result.seconds["gaps"] == pytest.approx(0.0, abs=len(steps) * IDLE * 0.1)
    assert tuple(result.seconds) == PARTS
    assert result.between_ms == pytest.approx(1e3 * IDLE)
    assert result.kernels["gemm"] == pytest.approx(len(steps) * KERNEL)
    assert 0 < result.traced_steps < len(steps)


def test_a_step_that_samples_nothing_joins_the_next() -> None:
    steps = [Step(0, 16, 0), Step(0, 16, 1), DECODE, Step(0, 16, 0)]
    fake = FakeDevice()
    fake.start()
    for step in steps:
        fake._take("kernel", "gemm", KERNEL)
        if step.sampled:
            fake._take("gpu_memcpy", "Memcpy DtoH", 0.0)
    item = account(Traced([0, 1, 2, 3], fake.stop()), steps, dict.fromkeys(range(4), 1.0))
    assert item.steps == [Step(0, 32, 1), Step(4, 16, 4)]
    assert [time.busy for time in item.times] == pytest.approx([2 * KERNEL, 2 * KERNEL])


def test_a_trace_without_the_steps_ends_counts_as_one() -> None:
    timeline = [Activity(0.0, KERNEL, "kernel", "gemm")]
    item = account(Traced([0, 1], timeline), [DECODE, DECODE], {0: 3.0, 1: 3.0})
    assert split([item], [DECODE, DECODE]).seconds["matrix products"] == pytest.approx(3 * KERNEL)


def test_the_recorder_times_what_running_requests_wait() -> None:
    engine = simulated_engine(max_running_requests=4, max_prefill_length=256)
    recorder = Recorder(engine.executor)
    engine.executor = recorder
    serve(engine, requests=4, tokens=10)
    assert len(recorder.collected) == len(recorder.waits) == len(recorder.steps) == 10
    assert recorder.num_pages == 64
    figures = step_figures(recorder)
    assert figures["steps"] == 10
    assert figures["steps_with_prefill"] == 1
    assert figures["largest_decode_batch"] == 4
    gaps = [later - earlier for earlier, later in itertools.pairwise(recorder.collected)]
    assert recorder.token_gaps() == gaps
    assert full_decodes([PREFILL, DECODE, Step(3, 0, 3), DECODE]) == [1, 3]
    assert full_decodes([]) == []
