"""`minisgl bench ablation`: each setting is tried between two runs of the default; one that fails stops no other."""

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from helpers.tiny_models import save_model
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.types import FinishReason, Request, SamplingParams, TokenEvent
from minisgl_bench import ablation
from minisgl_bench.ablation import CPU_SCENARIOS, TRIED, AblationRunner, Measurement, Variant, make_variants, play
from minisgl_bench.command import ABLATIONS, main
from minisgl_bench.report import distinct, draw_ablation, draw_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def small(folder: Path) -> Config:
    return Config(model=str(folder), device="cpu", max_running_requests=8)


def names(variants: Sequence[Variant]) -> list[str]:
    return [variant.name for variant in variants]


def test_every_variant_is_measured_between_two_runs_of_the_default(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, groups = tmp_path / "ablation.json", [name for name in ABLATIONS if name != "quantization"]
    flags = ["--model", str(folder), "--device", "cpu", "--max-running-requests", "8", "--only", ",".join(groups)]
    assert main(["ablation", *flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["measurements"]
    assert {row["variant"]["group"] for row in rows} == set(groups) - {"graphs", "attention"} | {"default"}
    assert all(row["error"] is None and row["output_tokens"] > 0 and row["ttft_p50_ms"] > 0 for row in rows)
    for before, row, after in zip(rows, rows[1:], rows[2:], strict=False):
        if row["variant"]["changes"]:
            rates = before["tokens_per_second"], after["tokens_per_second"]
            assert [each["variant"]["changes"] for each in (before, after)] == [{}, {}]
            assert len({each["variant"]["scenario"] for each in (before, row, after)}) == 1
            assert row["of_default"] == pytest.approx(row["tokens_per_second"] / (sum(rates) / 2))
            assert row["spread"] == pytest.approx((max(rates) - min(rates)) / (sum(rates) / 2))
    found = {(row["variant"]["scenario"], *row["variant"]["changes"].items()): row for row in rows}
    assert found["system-prompt", ("cache", "naive")]["cached_tokens"] == 0
    assert found["chats", ("cache", "naive")]["cached_tokens"] == 0
    assert found["system-prompt",]["cached_tokens"] == 3 * 96
    assert found["chats",]["cached_tokens"] >= 2 * (32 + 64)
    out = capsys.readouterr().out
    assert f"{len(rows)} runs of 0 s or one workload" in out
    assert "page_size=256" in out


def test_a_ratio_is_to_the_mean_of_the_two_defaults_beside_it_and_the_spread_is_theirs() -> None:
    default, off = Variant("default", "batch"), Variant("overlap", "batch", {"overlap": False})
    runs = [
        Measurement(variant=default, tokens_per_second=90.0, ttft_p50_ms=10.0),
        Measurement(variant=off, tokens_per_second=50.0, ttft_p50_ms=30.0),
        Measurement(variant=default, tokens_per_second=110.0, ttft_p50_ms=30.0),
        Measurement(variant=off, tokens_per_second=60.0, ttft_p50_ms=10.0),
        Measurement(variant=default, error="no"),
    ]
    found = ablation.against_default(runs, 1)
    assert found == pytest.approx({"of_default": 0.5, "ttft_of_default": 1.5, "spread": 0.2})
    assert [ablation.against_default(runs, index) for index in (0, 2, 3, 4)] == [{}] * 4
    assert ablation.against_default(runs[:2], 1) == {}


def test_a_variant_that_fails_is_told_and_the_next_runs(folder: Path) -> None:
    runner = AblationRunner(small(folder), CPU_SCENARIOS)
    good = runner.run(Variant("default", "long"))
    bad = runner.run(Variant("attention", "long", {"attn": "fa"}))
    assert (bad.error or "").startswith("ConfigError: --attn fa: fa cannot be used")
    assert [key[0] for key in runner._prepared] == ["torch"]  # the default's executor is still there
    good = runner.run(Variant("page-size", "long", {"page_size": 4}))
    assert (good.error, good.output_tokens >= 3 * 8) == (None, True)
    runner.close()


def test_a_scenario_that_the_context_cannot_hold_is_left_out(folder: Path) -> None:
    scenarios = CPU_SCENARIOS | {"longest": ablation.Scenario(1, own=(600, 600), answer=(1, 1))}
    runner = AblationRunner(small(folder), scenarios)
    assert list(runner.scenarios) == list(CPU_SCENARIOS)
    runner.close()


class Clock:
    """In place of the module `time`: it passes by sleeping alone."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_run_repeats_its_workload_with_an_empty_cache_until_its_seconds_have_passed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, played = Clock(), []

    def play_a_second(*args: Any) -> int:
        clock.sleep(1.0)
        played.append(play(*args))
        return played[-1]

    monkeypatch.setattr(ablation, "time", clock)
    monkeypatch.setattr(ablation, "play", play_a_second)
    runner = AblationRunner(small(folder).replace(launch_ahead="one-step"), CPU_SCENARIOS, seconds=2.5)
    found = runner.run(Variant("default", "system-prompt"))
    runner.close()
    assert len(played) == 1 + 3  # the first to warm up
    assert found.output_tokens == 3 * played[0]
    assert found.cached_tokens == 3 * 3 * 96
    assert found.tokens_per_second == played[0]


class OneStepEngine:
    """Answers all that it has with one token each, in a step that may be launched half a second after the last."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.launch_at, self.running = clock, 0.5, list[Request]()
        self.batches: list[list[str]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> None:
        self.running.append(request)

    def seconds_to_launch(self) -> float:
        return max(0.0, self.launch_at - self.clock.now)

    def step(self) -> list[TokenEvent]:
        self.batches.append([request.id for request in self.running])
        events = [TokenEvent(id=each.id, tokens=(7,), finish=FinishReason.LENGTH) for each in self.running]
        self.running, self.launch_at = [], self.clock.now + 0.5
        return events


@pytest.mark.parametrize(("clients", "batches"), [(0, ["01234"]), (2, ["01", "23", "4"])])
def test_requests_that_come_before_the_time_to_launch_are_in_the_step(
    monkeypatch: pytest.MonkeyPatch, clients: int, batches: list[str]
) -> None:
    clock, first_tokens = Clock(), list[float]()
    monkeypatch.setattr(ablation, "time", clock)
    engine = OneStepEngine(clock)
    requests = [Request(id=str(index), prompt_bytes=b"", params=SamplingParams()) for index in range(5)]
    assert ablation.serve(cast(Engine, engine), requests, clients, first_tokens) == [[7]] * 5
    assert ["".join(batch) for batch in engine.batches] == batches
    assert all(0.5 - ablation.THINK <= seconds < 0.51 for seconds in first_tokens)
    assert len(first_tokens) == 5


def test_a_quantised_variant_gets_weights_of_its_own(folder: Path) -> None:
    runner = AblationRunner(small(folder), CPU_SCENARIOS)
    runner.run(Variant("default", "short"))
    found = runner.run(Variant("quantization", "short", {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}))
    assert found.error is None
    default, other = (prepared.executor.runner for prepared in runner._prepared.values())
    assert default.kv.k.dtype != other.kv.k.dtype
    assert default.decoder.weights is runner.weights
    assert other.decoder.weights is not runner.weights
    runner.close()


def test_the_defaults_executor_is_kept_and_a_variants_is_freed_before_the_next(folder: Path) -> None:
    runner = AblationRunner(small(folder), CPU_SCENARIOS)
    assert runner.run(Variant("default", "batch")).error is None
    (default,) = runner._prepared.values()
    assert runner.run(Variant("overlap", "batch", {"overlap": False})).error is None
    assert len(runner._prepared) == 1
    assert runner.run(Variant("page-size", "batch", {"page_size": 1})).error is None
    first = list(runner._prepared.values())[1].executor
    gone, cache = weakref.ref(first), weakref.ref(first.runner.kv.k)
    del first
    assert runner.run(Variant("default", "batch")).error is None
    assert gone() is not None
    assert runner.run(Variant("page-size", "batch", {"page_size": 4})).error is None
    assert gone() is None
    assert cache() is None
    assert next(iter(runner._prepared.values())) is default
    runner.close()
    gc.collect()
    assert not runner._prepared


def test_variants_leave_out_what_is_configured_already() -> None:
    config = Config(attn="auto", max_prefill_length=8192, cuda_graph_max_bs=256, piecewise_cuda_graph_max_tokens=2048)
    made = make_variants(config, (*TRIED, *ablation.TRIED_ON_GPU), ablation.GPU_SCENARIOS)
    assert "launch_ahead=one-step" in names(made)
    assert "launch_ahead=just-in-time" not in names(made)
    chosen = make_variants(config, ablation.TRIED_ON_GPU, ["batch"])
    assert names(chosen) == [
        "default", "kv_cache_dtype=fp8_e4m3", "default", "quantization=fp8", "default",
        "quantization=fp8, kv_cache_dtype=fp8_e4m3", "default", "cuda_graph_max_bs=0", "default",
        "cuda_graph_max_bs=64", "default", "max_prefill_length=4096", "default",
    ]  # fmt: skip
    again = make_variants(config.replace(page_size=64), (*TRIED, *ablation.TRIED_ON_CPU), ["batch", "short"])
    assert names(again).count("page_size=64") == 0
    assert make_variants(config, TRIED, ["longest"]) == []


def test_all_on_a_gpu_takes_eight_minutes_at_most() -> None:
    config = Config(attn="auto", max_prefill_length=8192, cuda_graph_max_bs=256, piecewise_cuda_graph_max_tokens=2048)
    pairs = {"long": ("fi", "triton"), "batch": ("fa", "fi", "trtllm")}
    attention: list[ablation.Tried] = [("attention", scenario, {"attn": names}) for scenario, names in pairs.items()]
    runs = make_variants(config, (*TRIED, *ablation.TRIED_ON_GPU, *attention), ablation.GPU_SCENARIOS)
    assert len(runs) * (ablation.GPU_SECONDS + ablation.OVERHEAD) <= 8 * 60


def answer_all(engine: object, requests: list[Request], clients: int, first_tokens: list[float]) -> list[list[int]]:
    first_tokens += [0.1] * len(requests)
    return [[7] * (request.params.max_tokens or 0) for request in requests]


def test_conversations_grow_by_what_was_said_and_scenarios_say_how_much_they_take() -> None:
    seen: list[list[list[int]]] = []

    def answer(requests: list[Request]) -> list[list[int]]:
        seen.append([list(request.prompt) for request in requests])
        return answer_all(None, requests, 0, [])

    assert play(ablation.Scenario(2, own=(5, 5), answer=(2, 2), turns=3), answer, 100) == 12
    assert [[len(prompt) for prompt in turn] for turn in seen] == [[5, 5], [12, 12], [19, 19]]
    assert seen[1][0][:7] == [*seen[0][0], 7, 7]
    seen.clear()
    assert play(ablation.Scenario(3, own=(2, 2), answer=(1, 1), shared=6), answer, 100) == 3
    assert len({tuple(prompt[:6]) for prompt in seen[0]}) == 1
    assert len({tuple(prompt) for prompt in seen[0]}) == 3
    assert ablation.Scenario(2, own=(5, 5), answer=(2, 2), turns=3).tokens == 2 * (21 + 512)
    assert max(scenario.tokens for scenario in ablation.GPU_SCENARIOS.values()) < 500_000


def test_the_picture_needs_matplotlib_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.png"
    bars = [("default", "a", 1.0), ("overlap", "off", 0.5), ("default", "a", 1.0)]
    assert draw_file(path, lambda figure: draw_ablation(figure, "title", bars))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert distinct(["a", "b", "a"]) == ["a", "b", "a 2"]


def test_groups_that_cannot_be_tried_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablation", "--model", str(folder), "--device", "cpu", "--only", "graphs"]) == 1
    assert "--only graphs: there is nothing to try on this machine" in capsys.readouterr().err
