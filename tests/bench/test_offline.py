"""`minisgl bench offline` runs a workload, prints and writes its figures, and agrees with transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.tiny_tokenizers import byte_level_json
from minisgl import cli
from minisgl.bench.offline import build_parser, length_range

WORKLOAD = ["--num-requests", "3", "--input-len", "4:8", "--output-len", "6", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer."""
    library: Any = transformers
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    config = library.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3
    )
    library.LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text(byte_level_json())
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bench(folder: Path, *flags: str) -> int:
    small = ["--model", str(folder), "--device", "cpu", "--max-running-requests", "8", "--num-pages", "64"]
    return cli.main(["bench", "offline", *small, *WORKLOAD, *flags])


def test_figures_are_printed_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert bench(folder, "--json", str(path)) == 0
    report = json.loads(path.read_text())
    figures = report["figures"]
    assert figures["requests"] == 3
    assert figures["output_tokens"] == 18
    assert 12 <= figures["input_tokens"] <= 24
    assert figures["output_tokens_per_second"] == pytest.approx(18 / figures["seconds"])
    assert report["workload"]["seed"] == 3
    assert report["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert report["versions"]["torch"] == torch.__version__
    assert report["command"].endswith(f"--output-len 6 --seed 3 --json {path}")
    assert "dtype = float32" in " ".join(report["config"])
    assert "output tokens per second" in capsys.readouterr().out


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


def test_length_ranges() -> None:
    assert length_range("5") == (5, 5)
    assert length_range("5:9") == (5, 9)


def test_engine_flags_are_taken_and_the_servers_are_not() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {"--page-size", "--cache-type", "--tp", "--dummy-weights"} <= flags
    assert not {"--host", "--port", "--shell", "--shell-mode"} & flags
