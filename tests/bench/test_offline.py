"""`minisgl bench offline` runs a workload, prints and writes its figures, and agrees with transformers."""

import json
import os
from pathlib import Path

import pytest
import torch

from helpers.tiny_models import save_model
from minisgl.errors import ConfigError
from minisgl_bench import offline, profile
from minisgl_bench import report as report_module
from minisgl_bench.command import engine_parser, length_range, main
from minisgl_bench.profile import Activity

WORKLOAD = ["--num-requests", "3", "--input-len", "4:8", "--output-len", "6", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), max_position_embeddings=64)


def bench(folder: Path, *flags: str) -> int:
    small = ["--model", str(folder), "--device", "cpu", "--max-running-requests", "8", "--num-pages", "64"]
    return main(["offline", *small, *WORKLOAD, *flags])


def test_figures_are_printed_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert bench(folder, "--json", str(path)) == 0
    report = json.loads(path.read_text())
    figures = report["figures"]
    assert (figures["requests"], figures["output_tokens"]) == (3, 18)
    assert 12 <= figures["input_tokens"] <= 24
    assert figures["output_tokens_per_second"] == pytest.approx(18 / figures["seconds"])
    assert report["workload"]["seed"] == 3
    assert report["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert report["versions"]["torch"] == torch.__version__
    assert report["command"].endswith(f"--output-len 6 --seed 3 --json {path}")
    assert "dtype = float32" in " ".join(report["config"])
    assert (figures["steps"], figures["steps_with_prefill"], figures["largest_decode_batch"]) == (6, 1, 3)
    assert 0 < figures["decode_step_at_largest_batch_ms"] < 1e3 * figures["seconds"]
    assert figures["start_to_first_token_seconds"] > figures["seconds"]
    assert not report.keys() & {"roofline", "split"}
    assert "output tokens per second" in capsys.readouterr().out


def test_given_ceilings_make_a_floor(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert bench(folder, "--ceilings", "read=1e9,flops=2e9", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    figures, least = report["figures"], report["roofline"]
    assert (least["output_tokens"], least["decode_steps"]) == (18, 5)
    parts = least["prefill_seconds"] + least["kv_seconds"] + least["gemm_seconds"]
    assert least["seconds"] == pytest.approx(parts)
    assert figures["share_of_roofline"] == pytest.approx(least["seconds"] / figures["seconds"])
    assert report["peak_rates"] == {"read": 1e9, "flops": 2e9, "copy": None}
    assert "roofline: " in capsys.readouterr().out


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    for module in (offline, report_module):
        patch.setattr(module, "on_gpu", lambda config: True)


class NoProfiler:
    """Sees a device that does nothing."""

    def start(self) -> None:
        """Nothing to do."""

    def stop(self) -> list[Activity]:
        return []


def test_what_a_gpu_is_measured_for_goes_to_the_default_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(profile, "TorchProfiler", NoProfiler)
    monkeypatch.chdir(tmp_path)
    assert bench(folder, "--ceilings", "read=1e9,flops=2e9") == 0
    path = tmp_path / "benchmark" / "results" / f"{report_module.slug(str(folder))}-CPU-offline.json"
    report = json.loads(path.read_text())
    assert report["figures"]["decode_step_at_batch_1_ms"] > 0
    assert report["split"]["seconds"] == dict.fromkeys(profile.PARTS, 0.0)
    assert report["split"]["measured_seconds"] == report["figures"]["seconds"]
    assert report["split"]["traced_steps"] == 6
    assert report["figures"]["cached_input_tokens"] == 0
    assert "decode attention" in capsys.readouterr().out


def test_a_trace_that_fails_leaves_the_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: NoProfiler) -> list[Activity]:
        raise RuntimeError("no CUPTI")

    pretend_gpu(monkeypatch)
    monkeypatch.setattr(profile, "TorchProfiler", NoProfiler)
    monkeypatch.setattr(NoProfiler, "stop", fail)
    path = tmp_path / "report.json"
    assert bench(folder, "--ceilings", "read=1e9,flops=2e9", "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert report["split"] == {"error": "no CUPTI"}
    assert report["figures"]["output_tokens"] == 18
    assert "no split of the time: RuntimeError: no CUPTI" in capsys.readouterr().out
    assert bench(folder, "--ceilings", "read=1e9,flops=2e9", "--no-profile", "--json", str(path)) == 0
    assert "split" not in json.loads(path.read_text())


def test_comparison_finds_the_same_greedy_tokens_as_transformers(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert bench(folder, "--compare", "transformers", "--json", str(path)) == 0
    comparison = json.loads(path.read_text())["comparison"]
    assert comparison["same"] == comparison["requests"] == 24
    assert comparison["decode_ratio"] == pytest.approx(comparison["ours_decode"] / comparison["theirs_decode"])
    ratio = comparison["ours_throughput"] / comparison["theirs_throughput"]
    assert comparison["throughput_ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "transformers", "--dummy-weight"], "needs the checkpoint's weights"),
        (["--compare", "transformers", "--dtype", "bfloat16"], "measures in float32"),
        (["--compare", "transformers", "--output-len", "1:6"], "give --output-len of at least 2"),
        (["--json", "/nowhere/report.json"], "--json /nowhere/report.json: not a file that can be written"),
        (["--temperature", "nan"], "temperature must be between 0 and 100"),
        (["--input-len", "63", "--output-len", "9"], "maximum context length is 64 tokens"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_status_1(
    flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fidelity", "bench fidelity: give --quantization or --kv-cache-dtype"),
        ("online --serve --ssl-certfile c.pem --ssl-keyfile k.pem --rate 1", "--serve is measured without TLS"),
        ("streaming --model /nowhere", "the server ended with status 1 before it was ready"),
        ("collectives --json /nowhere/x", "--json /nowhere/x: not a file that can be written"),
        ("collectives --tp 99", f"--tp 99: there are {torch.cuda.device_count()} GPUs"),
    ],
)
def test_what_cannot_start_is_one_line(words: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_a_report_that_cannot_be_overwritten_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path)
    with pytest.raises(ConfigError, match="not a file that can be written"):
        report_module.require_writable(tmp_path / "x")


def test_a_table_shows_long_names_whole(capsys: pytest.CaptureFixture[str]) -> None:
    report_module.Report("simulate", [], None).print(report_module.table("", ("run",), [("m" * 200,)]))
    assert capsys.readouterr().out.count("m") == 200


def test_engine_flags_are_taken_and_the_servers_are_not() -> None:
    assert (length_range("5"), length_range("5:9")) == ((5, 5), (5, 9))
    flags = {flag for action in engine_parser("offline")._actions for flag in action.option_strings}
    assert {"--page-size", "--cache-type", "--tp", "--dummy-weights"} <= flags
    assert not {"--host", "--port", "--shell", "--shell-mode"} & flags
