"""Building an executor: how many KV pages there are, and what does not fit."""

import dataclasses
from pathlib import Path

import pytest
import torch

from helpers.driver import CPU
from helpers.models import TINY_LLAMA as SPEC
from minisgl.config import Config
from minisgl.core.attention import Attention, TorchAttention
from minisgl.core.decoder import Decoder
from minisgl.core.weights import dummy_weights
from minisgl.errors import ConfigError
from minisgl.gpu import memory
from minisgl.gpu.executor import build_local_executor, require_fp8
from minisgl.gpu.memory import GIB, group_limit, group_memory

PAGE_BYTES = 2 * SPEC.num_layers * 16 * SPEC.num_kv_heads * SPEC.head_dim * 4


def config(**settings: object) -> Config:
    base = Config(
        dummy_weight=True, device="cpu", dtype="float32", attn="torch,torch", cuda_graph_max_bs=0,
        max_running_requests=4, max_prefill_length=32,
    )  # fmt: skip
    return base.replace(**settings)


def measure(config: Config, before: int) -> int:
    attention = Attention(TorchAttention(), TorchAttention())
    decoder = Decoder(SPEC, dummy_weights(SPEC, torch.float32, CPU), attention, 64)
    return memory.measure_pages(config, decoder, 64, before)


@pytest.mark.parametrize(
    ("settings", "checkpoint", "cause"),
    [
        ({"quantization": "fp8"}, False, "--quantization fp8"),
        ({"kv_cache_dtype": "fp8_e4m3"}, False, "--kv-cache-dtype fp8_e4m3"),
        ({}, True, "this checkpoint"),
    ],
)
def test_fp8_is_refused_on_a_gpu_without_it(settings: dict[str, str], checkpoint: bool, cause: str) -> None:
    spec = dataclasses.replace(SPEC, fp8=checkpoint)
    with pytest.raises(ConfigError, match=f"^{cause} needs .* 8.9 or higher; this one has 8.0$"):
        require_fp8(config(**settings), spec, 80)
    for gpu in (0, 89, 90):
        require_fp8(config(**settings), spec, gpu)
    require_fp8(config(), SPEC, 80)


def test_building_with_made_up_weights_sizes_the_cache(tmp_path: Path) -> None:
    executor = build_local_executor(config(), tmp_path, SPEC, 64)
    assert executor.num_pages == 4 * 4  # all that 4 rows of 64 tokens can use, in pages of 16
    executor.launch(memory.prefill_plan(1, 3))
    assert 0 <= int(executor.collect().tokens[0]) < SPEC.vocab_size
    executor.close()
    executor = build_local_executor(config(num_pages=3), tmp_path, SPEC, 64)
    assert executor.num_pages == 3
    executor.close()


@pytest.mark.parametrize(
    ("settings", "left", "found"),  # pages, or the refusal
    [
        ({}, GIB, 16),  # what the rows can use
        ({"max_running_requests": 10**6}, 100 * GIB, 2 * GIB // PAGE_BYTES),
        ({"max_running_requests": 10**6}, GIB // 2, int(0.9 * GIB - GIB // 2) // PAGE_BYTES),
        ({"max_running_requests": 10**6, "memory_ratio": 0.75}, GIB // 2, GIB // 4 // PAGE_BYTES),
        ({"num_pages": 7}, GIB // 2, 7),
        # ranks on the CPU have one memory
        ({"max_running_requests": 10**6, "tp": 2}, 100 * GIB, 2 * GIB // (2 * PAGE_BYTES)),
        ({"max_running_requests": 10**6, "tp": 2, "memory_ratio": 0.75}, GIB // 2, GIB // 4 // (2 * PAGE_BYTES)),
        ({}, GIB // 20, r"no KV page fits: 1.00 GiB .* 0.9 may be used .* weights take 0.95"),
        ({"num_pages": 10**6}, GIB // 2, r"--num-pages 1000000 needs 3\.81 GiB: 1.00 GiB"),
        ({"num_pages": 10**6, "tp": 2}, GIB // 2, r"--num-pages 1000000 needs 7\.63 GiB: 1.00 GiB"),
    ],
)
def test_pages_share_the_memory_with_the_weights_or_are_refused_with_the_numbers(
    settings: dict[str, object], left: int, found: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: left)
    if isinstance(found, int):
        assert measure(config(**settings), before=max(GIB, left)) == found
        return
    with pytest.raises(ConfigError, match=found):
        measure(config(**settings), before=GIB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pages": 10**6}, r"--num-pages 1000000 needs 3\.81 GiB, and there are 3\.80 GiB of memory in all"),
        ({"num_pages": 10**30}, r"and there are 3\.80 GiB"),
        ({"num_pages": 1, "page_size": 1}, "--num-pages 1 of 1 token holds no request"),
    ],
)
def test_pages_that_can_never_fit_are_refused_before_anything_is_loaded(
    tmp_path: Path, settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda device: int(3.8 * GIB))
    with pytest.raises(ConfigError, match=message):  # and not ModelError: there are no weights
        build_local_executor(config(dummy_weight=False, **settings), tmp_path, SPEC, 64)


def test_a_control_group_limits_the_memory(tmp_path: Path) -> None:
    assert group_memory(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert group_memory(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("5000\n")
    assert group_memory(tmp_path) == 4000
    assert group_limit(tmp_path) == 5000
    assert memory.available_memory(CPU) < memory.total_memory(CPU)
