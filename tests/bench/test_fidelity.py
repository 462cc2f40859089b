"""`minisgl bench fidelity`: what it compares, and limits for the settings that run on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_model
from minisgl.core.quantization import has_vnni
from minisgl.core.types import TokenLogprobs
from minisgl_bench.command import main
from minisgl_bench.fidelity import differences

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="this CPU has no VNNI")


def fidelity(path: Path, *flags: str) -> dict[str, Any]:
    assert main(["fidelity", "--device", "cpu", "--num-pages", "512", "--json", str(path), *flags]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(
    ("flags", "mean", "maximum", "same"),
    [
        pytest.param(("--quantization", "int8"), 0.06, 0.6, 0.95, marks=needs_vnni),  # measured: 0.043, 0.40, 0.97
        (("--quantization", "fp8"), 0.12, 4.0, 0.91),  # 0.090, 2.9, 0.94
        (("--kv-cache-dtype", "fp8_e4m3"), 0.1, 2.0, 0.9),
    ],
)
def test_the_bundled_model_stays_within_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, str], mean: float, maximum: float, same: float
) -> None:
    report = fidelity(tmp_path / "report.json", "--output-len", "24", *flags)
    prefill, decode = report["prefill"], report["decode"]
    assert prefill["tokens"] > 500
    assert 0 < prefill["mean"] < mean
    assert prefill["mean"] < prefill["p99"] < prefill["maximum"] < maximum
    assert same < prefill["same_first"] < 1
    assert 20 < decode["tokens"] <= 20 * 24
    assert 0 < decode["mean"] < mean
    assert f"{flags[0].removeprefix('--').replace('-', '_')} = {flags[1]}" in report["config"]
    assert f"{prefill['mean']:,.4g}" in capsys.readouterr().out


@needs_vnni
@pytest.mark.parametrize("dummy", [(), ("--dummy-weight",)])
def test_models_without_text_get_random_prompts(tmp_path: Path, dummy: tuple[str, ...]) -> None:
    folder = save_model(tmp_path / "model", max_position_embeddings=48)
    (folder / "tokenizer.json").unlink()
    flags = ("--model", str(folder), "--quantization", "int8", "--output-len", "8", *dummy)
    report = fidelity(tmp_path / "report.json", *flags)
    assert report["prefill"]["tokens"] == 20 * (48 - 8 - 1 + 8 - 1)
    assert 0 < report["prefill"]["mean"] < 0.1


def test_differences_are_absolute() -> None:
    exact = [TokenLogprobs(-1.0, (3,), (-0.5,)), TokenLogprobs(-2.0, (4,), (-0.5,))]
    others = [TokenLogprobs(-1.5, (3,), (-0.5,)), TokenLogprobs(-1.0, (5,), (-0.5,))]
    found = differences(exact, others)
    assert (found["tokens"], found["mean"], found["maximum"], found["same_first"]) == (2, 0.75, 1.0, 0.5)
