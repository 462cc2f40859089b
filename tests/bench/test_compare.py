"""`minisgl bench compare` runs another engine on the same prompts in a process of its own; here a stub of it."""

import json
import os
from pathlib import Path

import pytest
import torch

from helpers.tiny_models import save_model
from minisgl.config import Config
from minisgl_bench import compare as comparison
from minisgl_bench.command import main
from minisgl_bench.compare import vllm_settings
from minisgl_bench.report import default_path, slug

STUB = '''
"""A stub that notes what it is asked for."""
import json, os, types
__version__ = "0.stub"
class SamplingParams:
    def __init__(self, **values):
        self.values = values
class LLM:
    def __init__(self, **settings):
        if settings.get("tensor_parallel_size") != 1:
            raise SystemExit(3)
        self.notes = {"settings": settings, "group": os.getpgid(0), "calls": []}
    def generate(self, prompts, params, use_tqdm):
        self.notes["calls"].append([[p["prompt_token_ids"] for p in prompts], [p.values for p in params]])
        with open(os.environ["STUB_NOTES"], "w") as file:
            json.dump(self.notes, file)
        output = lambda p: types.SimpleNamespace(token_ids=[0] * p.values["max_tokens"])
        print("a line of its own")
        return [types.SimpleNamespace(outputs=[output(p)]) for p in params]
'''


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", max_position_embeddings=64)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "vllm.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("STUB_NOTES", str(tmp_path / "notes.json"))
    return tmp_path / "notes.json"


def compare(model: Path, *flags: str) -> int:
    engine = ["--model", str(model), "--dummy-weight", "--device", "cpu", "--num-pages", "32"]
    workload = ["--num-requests", "2", "--input-len", "4:8", "--output-len", "3:5", "--temperature", "0.5"]
    return main(["compare", "--with", "vllm", *engine, *workload, *flags])


def test_both_engines_get_the_same_prompts(
    model: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert compare(model, "--cache", "naive", "--json", str(path)) == 0
    asked, report = json.loads(notes.read_text()), json.loads(path.read_text())
    settings = {"load_format": "dummy", "enable_prefix_caching": False, "dtype": "float32"}
    assert asked["settings"].items() >= settings.items()
    assert asked["group"] == os.getpgid(0)
    warm_up, measured = asked["calls"]
    assert [len(prompt) for prompt in warm_up[0]] == [len(prompt) for prompt in measured[0]]
    assert warm_up[0] != measured[0]
    assert sum(map(len, measured[0])) == report["ours"]["input_tokens"]
    lengths = [params["max_tokens"] for params in measured[1]]
    assert report["theirs"]["output_tokens"] == report["ours"]["output_tokens"] == sum(lengths)
    assert all(params["temperature"] == 0.5 and params["ignore_eos"] for params in measured[1])
    theirs = report["theirs"]["output_tokens"] / report["theirs"]["seconds"]
    assert report["ratio"] == pytest.approx(report["ours"]["output_tokens_per_second"] / theirs)
    assert "vllm 0.stub" in capsys.readouterr().out


def test_without_it_one_line_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparison, "find_spec", lambda name: None)
    assert compare(model) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --with vllm: it is not installed in ")


def test_its_failure_is_one_line(model: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not notes.exists()
    stub = notes.with_name("vllm.py")
    stub.write_text(stub.read_text().replace("!= 1", "== 1"))
    assert compare(model) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: vllm ended with status 3: see above"


def test_flags_become_its_arguments() -> None:
    config = Config(cuda_graph_max_bs=0, memory_ratio=0.8, max_running_requests=64, max_prefill_length=4096)
    settings = vllm_settings(config, "folder")
    expected = {"enforce_eager": True, "enable_prefix_caching": True, "load_format": "auto", "max_num_seqs": 64}
    expected |= {"max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.8}
    assert settings.items() >= expected.items()
    assert "max_model_len" not in settings


def test_reports_are_named_after_model_card_and_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    path = default_path("benchmark/models/Qwen3-0.6B/", "offline")
    assert path == Path("benchmark/results/Qwen3-0.6B-H200-offline.json")
    assert slug("Qwen/Qwen3 14B (a)") == "Qwen3-14B-a"
