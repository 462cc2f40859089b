"""`minisgl bench ablation`: every setting is tried over the same weights; one that fails does not stop the others."""

import gc
import json
import weakref
from pathlib import Path

import pytest

from helpers.tiny_models import save_model
from minisgl.config import Config
from minisgl_bench import ablation
from minisgl_bench.ablation import CPU_SCENARIOS, AblationRunner, Measurement, Scenario, Variant, make_variants, play
from minisgl_bench.command import ABLATIONS, main
from minisgl_bench.report import distinct, draw_ablation, draw_file
from minisgl_bench.workload import Workload


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def small(folder: Path) -> Config:
    return Config(model=str(folder), device="cpu", max_running_requests=8)


def test_all_groups_are_measured_against_their_default(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ablation.json"
    flags = ["--model", str(folder), "--device", "cpu", "--max-running-requests", "8", "--repeats", "1"]
    assert main(["ablation", *flags, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    rows = {f"{row['variant']['group']}: {row['variant']['label']}": row for row in report["measurements"]}
    assert {name.partition(":")[0] for name in rows} == set(ABLATIONS) - {"graphs", "attention"} | {"default"}
    assert all(row["error"] is None and row["output_tokens"] > 0 for row in rows.values())
    assert rows["system-prompt: naive"]["cached_tokens"] == rows["chats: naive"]["cached_tokens"] == 0
    defaults = [row for row in report["measurements"] if row["variant"]["group"] == "default"]
    assert [row["variant"]["scenario"] for row in defaults] == ["batch", "chats", "system-prompt", "long", "batch"]
    cached = {row["variant"]["scenario"]: row["cached_tokens"] for row in defaults}
    assert cached["system-prompt"] == 3 * 96
    assert cached["chats"] >= 2 * (32 + 64)
    assert defaults[0]["of_default"] == 1.0
    base = defaults[3]["tokens_per_second"]
    assert rows["chunk-size: 16"]["of_default"] == pytest.approx(rows["chunk-size: 16"]["tokens_per_second"] / base)
    assert "page-size: 256" in capsys.readouterr().out


def test_a_variant_that_fails_is_told_and_the_next_runs(folder: Path) -> None:
    scenarios = dict(CPU_SCENARIOS)
    runner = AblationRunner(small(folder), scenarios)
    bad = runner.run(Variant(group="attention", label="fa", scenario="batch", changes={"attn": "fa"}))
    assert (bad.error or "").startswith("ConfigError: --attn fa: fa cannot be used")
    scenarios["batch"] = Scenario(1, own=(600, 600), answer=(1, 1))
    late = runner.run(Variant(group="default", label="", scenario="batch"))
    assert "maximum context length is 512" in (late.error or "")
    good = runner.run(Variant(group="page-size", label="4", scenario="long", changes={"page_size": 4}))
    assert (good.error, good.output_tokens >= 3 * 8) == (None, True)
    runner.close()


def test_of_several_runs_the_median_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = AblationRunner(small(folder), CPU_SCENARIOS, repeats=4)
    variant = Variant(group="default", label="", scenario="batch")
    rates = iter([99.0, 40.0, 10.0, 30.0, 20.0])  # the first is the warm-up's

    def once(*_: object) -> Measurement:
        rate = next(rates)
        return Measurement(variant=variant, tokens_per_second=rate, token_gap_max_ms=1000 / rate)

    monkeypatch.setattr(runner, "_once", once)
    found = runner.run(variant)
    assert (found.tokens_per_second, found.token_gap_max_ms) == (20.0, 50.0)
    assert found.each_tokens_per_second == (10.0, 20.0, 30.0, 40.0)
    runner.close()


def test_an_executor_serves_variants_that_can_share_it_and_is_freed_after_them(folder: Path) -> None:
    runner = AblationRunner(small(folder), CPU_SCENARIOS)
    assert runner.run(Variant(group="default", label="", scenario="batch")).error is None
    first = runner._executor
    assert first is not None
    off = Variant(group="overlap", label="off", scenario="batch", changes={"overlap": False})
    assert runner.run(off).error is None
    assert runner._executor is first
    gone, cache = weakref.ref(first), weakref.ref(first.runner.kv.k)
    del first
    assert runner.run(Variant(group="page-size", label="1", scenario="batch", changes={"page_size": 1})).error is None
    assert gone() is None
    assert cache() is None
    runner.close()
    gc.collect()
    assert runner._executor is None


def test_variants_leave_out_what_is_configured_already() -> None:
    config = Config(attn="auto", max_prefill_length=8192, cuda_graph_max_bs=256, max_running_requests=256)
    made = make_variants(config, ABLATIONS, ["fa", "triton"], gpu=True)
    names = [variant.name for variant in made]
    assert "chunk-size: 4096" in names
    assert "chunk-size: 8192" not in names
    assert "page-size: 16" not in names
    assert [name.partition(": ")[2] for name in names if name.startswith("graphs")] == [
        "off", "up to 4", "up to 64", "with prompts, off", "with prompts, up to 512", "with prompts, up to 2048",
    ]  # fmt: skip
    assert [name.partition(": ")[2] for name in names if name.startswith("attention")] == [
        "fa,fa", "fa,triton", "triton,fa", "triton,triton",
    ]  # fmt: skip
    assert (made[0].group, made[-1].group) == ("default", "default")
    only = make_variants(config, ["overlap"], ["fa", "triton"], gpu=True)
    assert [variant.name for variant in only] == ["default: as configured", "overlap: off", "default: as configured"]


def test_conversations_grow_by_what_was_said_and_scenarios_say_how_much_they_take() -> None:
    seen: list[list[list[int]]] = []

    def answer(workload: Workload) -> list[list[int]]:
        seen.append(workload.prompts)
        return [[7] * (params.max_tokens or 0) for params in workload.params]

    assert play(Scenario(2, own=(5, 5), answer=(2, 2), turns=3), answer, 100) == 12
    assert [[len(prompt) for prompt in turn] for turn in seen] == [[5, 5], [12, 12], [19, 19]]
    assert seen[1][0][:7] == [*seen[0][0], 7, 7]
    seen.clear()
    assert play(Scenario(3, own=(2, 2), answer=(1, 1), shared=6), answer, 100) == 3
    assert len({tuple(prompt[:6]) for prompt in seen[0]}) == 1
    assert len({tuple(prompt) for prompt in seen[0]}) == 3
    assert Scenario(2, own=(5, 5), answer=(2, 2), turns=3).tokens == 2 * (21 + 512)
    assert max(scenario.tokens for scenario in ablation.GPU_SCENARIOS.values()) < 1_000_000


def test_the_picture_needs_matplotlib_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = Measurement(variant=Variant(group="default", label="a", scenario="batch"), tokens_per_second=10.0)
    half = Measurement(variant=Variant(group="overlap", label="off", scenario="batch"), tokens_per_second=5.0)
    failed = Measurement(variant=Variant(group="graphs", label="off", scenario="batch"), error="no")
    assert [ablation.ratio(item, [base, half, failed]) for item in (base, half, failed)] == [1.0, 0.5, None]
    path = tmp_path / "chart.png"
    bars = [("default", "a", 1.0), ("overlap", "off", 0.5), ("default", "a", 1.0)]
    assert draw_file(path, lambda figure: draw_ablation(figure, "title", bars))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert distinct(["a", "b", "a"]) == ["a", "b", "a 2"]


def test_groups_that_cannot_be_tried_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablation", "--model", str(folder), "--device", "cpu", "--only", "graphs"]) == 1
    assert "--only graphs: there is nothing to try on this machine" in capsys.readouterr().err
