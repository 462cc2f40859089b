"""What `--attn` means on which GPU, with which packages and for which model."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.models import tiny_spec
from minisgl.config import ATTENTION_BACKENDS, Config, Machine, resolve
from minisgl.core.attention import TorchAttention
from minisgl.errors import ConfigError
from minisgl.gpu.attention.select import BACKENDS, Shape, available_backends, choose, make_attention, refusal
from minisgl.gpu.executor import build_local_executor

SHAPE = Shape(head_dim=128, dtype=torch.bfloat16, page_size=16)
ALL: dict[str, str | None] = dict.fromkeys(BACKENDS)
CPU = torch.device("cpu")


def without(*names: str) -> dict[str, str | None]:
    return {name: "it is not installed" if name in names else None for name in BACKENDS}


@pytest.mark.parametrize(
    ("pair", "shape", "missing", "gpu", "prefill", "decode"),
    [
        ("fa,fi", SHAPE, (), 90, "fa", "fi"),
        ("triton", SHAPE, (), 90, "triton", "triton"),
        ("auto", SHAPE, (), 90, "fa", "triton"),
        ("auto", SHAPE, ("fa",), 90, "fi", "triton"),
        ("auto", SHAPE, ("triton",), 90, "fa", "fa"),
        ("auto", dataclasses.replace(SHAPE, dtype=torch.float32), (), 90, "triton", "triton"),
        ("auto", SHAPE, (), 100, "fa", "trtllm"),
        ("auto", SHAPE, ("trtllm",), 80, "fa", "fi"),
        ("auto", SHAPE, ("fa", "fi", "trtllm", "triton"), 75, "torch", "torch"),
    ],
)
def test_pair_or_auto_chooses_for_prefill_and_decode(
    pair: str, shape: Shape, missing: tuple[str, ...], gpu: int, prefill: str, decode: str
) -> None:
    choice = choose(pair, shape, without(*missing), gpu)
    assert (choice.prefill, choice.decode) == (prefill, decode)


def test_auto_says_why_and_what_is_missing_and_a_missing_choice_is_an_error_that_names_what_works() -> None:
    assert str(choose("auto", SHAPE, ALL, 90)) == "prefill fa, decode triton: the fastest measured on Hopper"
    assert "fa is out, it is not installed" in str(choose("auto", SHAPE, without("fa"), 75))
    message = "fa cannot be used, it is not installed; what works here: fi, trtllm, triton"
    with pytest.raises(ConfigError, match=message):
        choose("fi,fa", SHAPE, without("fa"), 90)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("trtllm", {"page_size": 128}, "page-size of 16, 32 or 64, not 128"),
        ("fi", {"page_size": 48}, "page-size that is a power of two, not 48"),
        ("fi", {"head_dim": 80}, "head dimensions 64, 128 and 256, not 80"),
        ("fa", {"head_dim": 512}, "up to 256, not 512"),
        ("fa", {"dtype": torch.float32}, "takes float16 and bfloat16, not float32"),
        ("triton", {"head_dim": 40}, "multiple of 16, up to 256, not 40"),
    ],
)
def test_shape_a_backend_cannot_take_is_an_error_that_says_what_it_can(
    name: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, dataclasses.replace(SHAPE, **change), ALL, 90)  # type: ignore[arg-type]


def test_the_names_of_the_flag_are_those_of_the_table() -> None:
    assert tuple(BACKENDS) == ATTENTION_BACKENDS


@pytest.mark.parametrize(("pair", "name"), [("fa", "fa"), ("fa,fi", "fa"), ("torch,trtllm", "trtllm"), ("triton",) * 2])
def test_what_needs_a_gpu_is_refused_on_a_cpu_before_weights_are_loaded(pair: str, name: str, tmp_path: Path) -> None:
    config = resolve(Config(attn=pair, device="cpu"), Machine(), "float32").config
    with pytest.raises(ConfigError, match=f"--attn {pair}: {name} cannot be used, it needs a CUDA GPU; .* here: torch"):
        build_local_executor(config, tmp_path / "no weights", tiny_spec(), 64)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 256])
def test_any_page_size_suits_flash_attention_triton_and_torch(page_size: int) -> None:
    shape = dataclasses.replace(SHAPE, page_size=page_size)
    assert [name for name in ("fa", "triton", "torch") if refusal(name, shape)] == []


def test_cpu_has_torch_alone_and_says_so() -> None:
    attention, choice = make_attention("auto", SHAPE, CPU)
    assert isinstance(attention.prefill, TorchAttention)
    assert str(choice) == "prefill torch, decode torch: the CPU's backend"
    assert available_backends(CPU)["triton"] == "it needs a CUDA GPU"
    with pytest.raises(ConfigError, match="fi cannot be used, it needs a CUDA GPU; what works here: torch"):
        make_attention("fi", SHAPE, CPU)


def test_a_cpu_needs_neither_triton_nor_cuda_packages() -> None:
    blocked = "sys.modules.update(dict.fromkeys(['triton', 'flashinfer', 'cuda', 'nccl']))"
    done = subprocess.run([sys.executable, "-c", f"import sys; {blocked}; import minisgl.gpu.executor"], check=False)
    assert done.returncode == 0
