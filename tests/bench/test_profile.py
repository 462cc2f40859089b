"""Some steps of a run are traced, and stand for all of them."""

import itertools
from typing import Any

import pytest

from helpers.simulation import simulated_engine
from minisgl.core.engine import Engine
from minisgl.core.plan import StepPlan
from minisgl.core.types import Request, SamplingParams
from minisgl_bench import profile as profiler

PREFILL, DECODE = profiler.Step(0, 64, 1), profiler.Step(4, 0, 4)
KERNEL = 1e-3
IDLE = 1e-4


def serve(engine: Engine, requests: int = 5, tokens: int = 40) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)
    for index in range(requests):
        engine.add(Request.make(str(index), [index + 1] * 24, params))
    while engine.has_work:
        engine.step()


class FakeDevice(profiler.TorchProfiler):
    """A profiler over launches: each step takes KERNEL in a GEMM, then IDLE, and a copy back if it samples."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.timeline: list[profiler.Activity] | None = None

    def start(self) -> None:
        assert self.timeline is None
        self.timeline = []

    def stop(self) -> list[profiler.Activity]:
        assert self.timeline is not None
        timeline, self.timeline = self.timeline, None
        return timeline

    def step(self, sampled: int) -> None:
        self._take("kernel", "gemm", KERNEL)
        self.clock += IDLE
        if sampled:
            self._take("gpu_memcpy", "Memcpy DtoH", 0.0)

    def _take(self, category: str, name: str, seconds: float) -> None:
        if self.timeline is not None:
            self.timeline.append(profiler.Activity(self.clock, self.clock + seconds, category, name))
        self.clock += seconds


class Device(profiler.Recorder):
    """A recorder that tells the fake device what is launched."""

    fake: FakeDevice

    def launch(self, plan: StepPlan) -> None:
        self.fake.step(len(plan.sampled_slots))
        super().launch(plan)


def test_every_step_is_stood_for_once() -> None:
    steps = [PREFILL] * 18 + [DECODE] * 1000
    weights = profiler.choose_steps(steps)
    assert sum(weights[index] for index in weights if index < 18) == pytest.approx(18)
    assert sum(weights[index] for index in weights if index >= 18) == pytest.approx(1000)
    assert len(weights) == 18 + profiler.SECTIONS[True] * profiler.TRACED
    assert profiler.choose_steps([DECODE]) == {0: 1.0}
    assert profiler.choose_steps([]) == {}


def test_a_traced_run_is_split_as_the_whole_run_is() -> None:
    recorded = simulated_engine()
    recorded.executor = recorder = profiler.Recorder(recorded.executor)
    serve(recorded, tokens=100)
    steps = recorder.steps
    again, fake = simulated_engine(), FakeDevice()
    device = Device(again.executor)
    device.fake = fake

    def run(tracer: profiler.Tracer) -> None:
        again.executor = tracer
        serve(again, tokens=100)

    result = profiler.profile(device, steps, run, fake)
    decodes = sum(step.decodes_only for step in steps)
    assert device.steps == steps
    assert result["seconds"]["GEMMs"] == pytest.approx(decodes * KERNEL)
    assert result["seconds"]["prefill"] == pytest.approx((len(steps) - decodes) * KERNEL)
    assert result["seconds"]["host"] == pytest.approx(len(steps) * IDLE, rel=0.1)
    assert result["seconds"]["gaps"] == pytest.approx(0.0, abs=len(steps) * IDLE * 0.1)
    assert tuple(result["seconds"]) == profiler.PARTS
    assert result["between_ms"] == pytest.approx(1e3 * IDLE)
    assert 0 < result["traced_steps"] < len(steps)


def test_a_step_that_samples_nothing_has_no_end_of_its_own() -> None:
    fake = FakeDevice()
    fake.start()
    steps = [profiler.Step(0, 16, 0), profiler.Step(0, 16, 1), profiler.Step(0, 16, 1), profiler.Step(0, 16, 0)]
    for step in steps:
        fake.step(step.sampled)
    split = profiler.split_time([profiler.StepTrace(steps, 2.0, fake.stop())])
    assert split["seconds"]["prefill"] == pytest.approx(2 * 4 * KERNEL)
    assert split["seconds"]["gaps"] == pytest.approx(2 * IDLE)
    assert split["seconds"]["host"] == pytest.approx(2 * 2 * IDLE)


US = 1e-6


def event(start: float, length: float, name: str, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}


def copy(start: float, direction: str) -> dict[str, Any]:
    return event(start, 1, f"Memcpy {direction}", "gpu_memcpy")


TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 500},
        copy(100, "HtoD"), event(103, 10, "flash::FlashAttnFwdSm90"), event(115, 20, "nvjet_tst"), copy(136, "DtoH"),
        copy(140, "HtoD"), event(143, 10, "_split_kernel"), event(153, 5, "sm90_xmma_gemm_bf16"), copy(160, "DtoH"),
    ]
}  # fmt: skip


def test_time_is_told_apart() -> None:
    spent = profiler.DeviceTime(profiler.activities(TRACE))
    assert spent.kernels == pytest.approx({"attention": 10 * US, "gemm": 25 * US, "other": (2 + 12) * US})
    assert spent.gaps == pytest.approx(2 * US)
    assert spent.between == pytest.approx([(1 + 3 + 2) * US])  # before the copy back, after it, before the first kernel
    before_the_first_kernel, behind_the_last = 2, 2
    total = sum(spent.kernels.values()) + spent.gaps + sum(spent.between)
    assert total == pytest.approx((161 - 100 - before_the_first_kernel - behind_the_last) * US)


def test_overlapping_kernels_count_once() -> None:
    events = [event(0, 10, "gemm"), event(5, 10, "norm"), event(6, 2, "norm")]
    spent = profiler.DeviceTime(profiler.activities({"traceEvents": events}))
    assert spent.kernels == pytest.approx({"gemm": 10 * US, "other": 5 * US})
    assert (spent.gaps, spent.between) == (0.0, [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<>>>", "attention"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<>", "attention"),
        ("kernel_mha", "attention"),
        ("_prefill_kernel", "attention"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_TNT", "gemm"),
        ("void cublasLt::splitKreduce_kernel<>", "gemm"),
        ("_gate_up_kernel", "gemm"),
        ("_norm_kernel", "other"),
        ("_split_kernel", "other"),
    ],
)
def test_kernels_are_sorted_by_name_and_copies_are_none(name: str, expected: str) -> None:
    assert profiler.Activity(0.0, 1.0, "kernel", name).kind == expected
    assert profiler.Activity(0.0, 1.0, "gpu_memcpy", name).kind == "other"


def test_the_recorder_times_what_running_requests_wait() -> None:
    engine = simulated_engine(max_running_requests=4, max_prefill_length=256)
    engine.executor = recorder = profiler.Recorder(engine.executor)
    serve(engine, requests=4, tokens=10)
    assert len(recorder.collected) == len(recorder.waits) == len(recorder.steps) == 10
    assert recorder.num_pages == 64
    figures = recorder.figures()
    assert (figures["steps"], figures["steps_with_prefill"], figures["largest_decode_batch"]) == (10, 1, 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(recorder.collected)]
    assert recorder.token_gaps() == gaps
    assert profiler.full_decodes([PREFILL, DECODE, profiler.Step(3, 0, 3), DECODE]) == [1, 3]
    assert profiler.full_decodes([]) == []
