"""What is kept free for CUDA graphs, against what they took of an H200."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.errors import ConfigError
from minisgl.gpu.memory import graph_bytes, require_weights_fit

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
MIB = 2**20


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_spec(MODELS / "Qwen3-0.6B")


def reserved(spec: ModelSpec, **settings: Any) -> int:
    base: dict[str, Any] = {"cuda_graph_max_bs": 0, "piecewise_cuda_graph_max_tokens": 0, "max_running_requests": 256}
    config = Config(**{**base, "max_prefill_length": 8192, **settings})
    return graph_bytes(config, spec, spec.vocab_size, torch.bfloat16, spec.max_position)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"cuda_graph_max_bs": 256}, 128),
        ({"cuda_graph_max_bs": 64}, 27),
        ({"cuda_graph_max_bs": 256, "page_size": 1}, 608),
        ({"cuda_graph_max_bs": 256, "page_size": 256}, 103),
    ],
)
def test_it_is_about_what_decode_graphs_took(settings: dict[str, Any], measured: int, spec: ModelSpec) -> None:
    assert reserved(spec, **settings) == pytest.approx(measured * MIB, rel=0.2)
    assert reserved(spec) == 0


def test_graphs_between_attentions_have_their_own(spec: ModelSpec) -> None:
    most = reserved(spec, piecewise_cuda_graph_max_tokens=2048)
    few = reserved(spec, piecewise_cuda_graph_max_tokens=2048, max_prefill_length=256, max_running_requests=8)
    assert 200 * MIB < most < 400 * MIB
    assert reserved(spec, piecewise_cuda_graph_max_tokens=512) < most
    assert few < most / 2
    assert reserved(spec, piecewise_cuda_graph_max_tokens=2048, cuda_graph_max_bs=256) > most + 100 * MIB


def test_experts_count_as_many_times_as_a_token_has() -> None:
    experts = read_spec(MODELS / "Qwen3-30B-A3B")
    assert experts.moe is not None
    assert reserved(experts, piecewise_cuda_graph_max_tokens=2048) > 2048 * 2 * 8 * 3 * experts.moe.width


def test_a_model_with_experts_may_fit_in_fp8_only(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, gpu = read_spec(MODELS / "Qwen3-30B-A3B"), torch.device("cuda")
    monkeypatch.setattr("minisgl.gpu.memory.available_memory", lambda device: 40 << 30)
    require_weights_fit(experts, torch.bfloat16, gpu, None, fp8=True)
    with pytest.raises(ConfigError, match=r"its weights take 56\.\d+ GiB in bfloat16, and 40\.00 GiB"):
        require_weights_fit(experts, torch.bfloat16, gpu, None)
