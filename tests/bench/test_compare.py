"""`minisgl bench compare` runs another engine on the same prompts in a process of its own; here a stub of it."""

import json
import os
from pathlib import Path

import pytest
import torch

from minisgl.config import Config
from minisgl_bench import compare as comparison
from minisgl_bench.command import main
from minisgl_bench.compare import vllm_settings
from minisgl_bench.report import default_path, slug

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

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
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.set_num_threads(1)
    return path


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
    assert asked["settings"]["load_format"] == "dummy"
    assert asked["settings"]["enable_prefix_caching"] is False
    assert asked["settings"]["dtype"] == "float32"
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
    config = Config(
        dtype="bfloat16", cuda_graph_max_bs=0, memory_ratio=0.8, max_running_requests=64, max_prefill_length=4096
    )
    settings = vllm_settings(config, "folder")
    assert settings["enforce_eager"] is True
    assert settings["enable_prefix_caching"] is True
    assert settings["load_format"] == "auto"
    assert (settings["max_num_seqs"], settings["max_num_batched_tokens"]) == (64, 4096)
    assert settings["gpu_memory_utilization"] == 0.8
    assert "max_model_len" not in settings


def test_reports_are_named_after_model_card_and_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    path = default_path("benchmark/models/Qwen3-0.6B/", "offline")
    assert path == Path("benchmark/results/Qwen3-0.6B-H200-offline.json")
    assert slug("Qwen/Qwen3 14B (a)") == "Qwen3-14B-a"
