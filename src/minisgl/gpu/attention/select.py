"""Which attention backend computes what: a table of backends with their requirements, and the choice of `auto`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from minisgl.core.attention import Attention, AttentionBackend, TorchAttention
from minisgl.errors import ConfigError
from minisgl.gpu.attention.flash_attn import FlashAttention
from minisgl.gpu.attention.flashinfer import FlashInfer, TensorRTLLM
from minisgl.gpu.attention.triton import TritonAttention

TRITON = {"triton": "triton"}
FLASHINFER = {"flashinfer": "flashinfer-python (module flashinfer)"} | TRITON
FLASH_ATTENTION_3 = {"flash_attn_interface": "flash-attn-3 (module flash_attn_interface)"}


@dataclass(frozen=True)
class Rule:
    """Which numbers a backend takes, and how an error says it."""

    takes: Callable[[int], bool]
    text: str


@dataclass(frozen=True)
class Backend:
    """How a backend is made, what it needs of the machine, and what it takes."""

    make: Callable[[torch.device], AttentionBackend]
    packages: Mapping[str, str]  # module -> how an error names its package
    capability: Rule  # of the GPU, as `capability` gives it: 0 is the CPU
    page_size: Rule
    head_dim: Rule
    half_only: bool = True
    fp8_kv: bool = False


ANY = Rule(lambda number: True, "any")
ANY_GPU = Rule(lambda gpu: gpu > 0, "any")
HOPPER = Rule(lambda gpu: gpu // 10 == 9, "9.x")
AMPERE_ON = Rule(lambda gpu: gpu >= 80, "8.0 or higher")
HOPPER_BLACKWELL = Rule(lambda gpu: gpu // 10 in (9, 10, 12), "9.0, 10.x or 12.x")
POWER_OF_2 = Rule(lambda size: size & (size - 1) == 0, "a --page-size that is a power of two")
FROM_16_TO_64 = Rule(lambda size: size in (16, 32, 64), "a --page-size of 16, 32 or 64")
MULTIPLE_OF_8 = Rule(lambda dim: dim <= 256 and dim % 8 == 0, "head dimensions that are a multiple of 8, up to 256")
MULTIPLE_OF_16 = Rule(lambda dim: dim <= 256 and dim % 16 == 0, "head dimensions that are a multiple of 16, up to 256")
THREE_DIMS = Rule(lambda dim: dim in (64, 128, 256), "head dimensions 64, 128 and 256")

BACKENDS: dict[str, Backend] = {
    "fa": Backend(lambda device: FlashAttention(), FLASH_ATTENTION_3, HOPPER, ANY, MULTIPLE_OF_8, fp8_kv=True),
    "fi": Backend(FlashInfer, FLASHINFER, AMPERE_ON, POWER_OF_2, THREE_DIMS),
    "trtllm": Backend(TensorRTLLM, FLASHINFER, HOPPER_BLACKWELL, FROM_16_TO_64, MULTIPLE_OF_16),
    "triton": Backend(TritonAttention, TRITON, ANY_GPU, ANY, MULTIPLE_OF_16, half_only=False, fp8_kv=True),
    "torch": Backend(lambda device: TorchAttention(), {}, ANY, ANY, ANY, half_only=False, fp8_kv=True),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What backends may refuse."""

    head_dim: int
    dtype: torch.dtype
    page_size: int
    fp8_kv: bool = False


@dataclass(frozen=True)
class AttentionChoice:
    """A backend for prefill and one for decode, and why."""

    prefill: str
    decode: str
    why: str

    def __str__(self) -> str:
        return f"prefill {self.prefill}, decode {self.decode}: {self.why}"


def capability(device: torch.device) -> int:
    """The GPU's compute capability as 10 × major + minor; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def available_backends(device: torch.device) -> dict[str, str | None]:
    """Each backend with the reason why it cannot run here, or None."""
    gpu = capability(device)
    return {name: _unavailable(backend, gpu) for name, backend in BACKENDS.items()}


def _unavailable(backend: Backend, gpu: int) -> str | None:
    if not backend.capability.takes(gpu):
        needs = f"it needs compute capability {backend.capability.text}, the GPU has {gpu / 10}"
        return needs if gpu else "it needs a CUDA GPU"
    missing = [package for module, package in backend.packages.items() if find_spec(module) is None]
    return f"it needs the package {missing[0]}" if missing else None


def refusal(name: str, shape: Shape) -> str | None:
    """Why a backend cannot compute attention of this shape, with what it can; or None."""
    backend = BACKENDS[name]
    if backend.half_only and shape.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(shape.dtype).removeprefix('torch.')}"
    if shape.fp8_kv and not backend.fp8_kv:
        return "it takes no keys and values in FP8"
    for rule, number in ((backend.page_size, shape.page_size), (backend.head_dim, shape.head_dim)):
        if not rule.takes(number):
            return f"it takes {rule.text}, not {number}"
    return None


def choose(pair: str, shape: Shape, available: Mapping[str, str | None], gpu: int) -> AttentionChoice:
    """The backends that `--attn pair` means: `auto`, one name, or `prefill,decode`. `gpu` is its `capability`.

    Raises ConfigError for a name that cannot run here or with this shape, saying what can.
    """
    reasons = {name: available[name] or refusal(name, shape) for name in BACKENDS}
    works = [name for name in BACKENDS if reasons[name] is None]
    if pair == "auto":
        return _automatic(works, reasons, gpu)
    prefill, decode = pair.split(",") if "," in pair else (pair, pair)
    for name in (prefill, decode):
        if reason := reasons[name]:
            raise ConfigError(f"--attn {pair}: {name} cannot be used, {reason}; what works here: {', '.join(works)}")
    return AttentionChoice(prefill, decode, "as asked for")


def _automatic(works: list[str], reasons: Mapping[str, str | None], gpu: int) -> AttentionChoice:
    missing = "; ".join(f"{name} is out, {reason}" for name, reason in reasons.items() if reason and gpu)
    prefill: str = next(name for name in ("fa", "fi", "triton", "torch") if name in works)
    if gpu // 10 == 9:  # as `minisgl bench attention` measures; triton's decode needs no work on the host
        decode = "triton" if "triton" in works else prefill
        why = "the fastest measured on Hopper"
    else:
        decode = next((name for name in ("trtllm", "fi") if name in works), prefill)
        why = f"what works best on compute capability {gpu / 10}" if gpu else "the CPU's backend"
    return AttentionChoice(prefill, decode, f"{why}; {missing}" if missing else why)


def make_attention(pair: str, shape: Shape, device: torch.device) -> tuple[Attention, AttentionChoice]:
    """The backends for `--attn pair`, ready, with what was chosen. Raises ConfigError as `choose` does."""
    gpu = capability(device)
    choice = choose(pair, shape, available_backends(device), gpu)
    prefill = choice.prefill
    if prefill == "trtllm" and gpu // 10 != 10:
        if reason := refusal("fi", shape):
            raise ConfigError(f"--attn {pair}: prefill of trtllm goes through FlashInfer here, and {reason}")
        prefill = "fi"
    decode_backend = BACKENDS[choice.decode].make(device)
    prefill_backend = decode_backend if prefill == choice.decode else BACKENDS[prefill].make(device)
    return Attention(prefill_backend, decode_backend), choice
