"""Which attention backend computes what: the rules of each, what is installed, and the choice of `auto`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from minisgl.core.attention import Attention, AttentionBackend, TorchAttention
from minisgl.errors import ConfigError

BACKENDS = ("fa", "fi", "trtllm", "triton", "torch")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What backends may refuse. Heads are those of one device."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_size: int


@dataclass(frozen=True)
class Choice:
    """A backend for prefill and one for decode, and why."""

    prefill: str
    decode: str
    why: str

    def __str__(self) -> str:
        return f"prefill {self.prefill}, decode {self.decode}: {self.why}"


def capability(device: torch.device) -> int:
    """The card's compute capability as 10 × major + minor; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def flash_attention_version(card: int) -> int | None:
    """The version of FlashAttention that is installed and made for this card: 3 on Hopper, 4 from Hopper on, or 2."""
    if card // 10 == 9 and find_spec("flash_attn_interface"):
        return 3
    if find_spec("flash_attn") is None:
        return None
    if card >= 90 and find_spec("flash_attn.cute"):
        return 4
    return 2 if card >= 80 and find_spec("flash_attn.flash_attn_interface") else None


def available_backends(device: torch.device) -> dict[str, str | None]:
    """Each backend with the reason why it cannot run here, or None."""
    card = capability(device)
    if card == 0:
        return {name: None if name == "torch" else "it needs a CUDA card" for name in BACKENDS}
    reasons: dict[str, str | None] = dict.fromkeys(BACKENDS)
    triton = None if find_spec("triton") else "it needs the package triton"
    flashinfer = None if find_spec("flashinfer") else "it needs the package flashinfer-python (module flashinfer)"
    reasons["fa"] = reasons["fi"] = f"it needs compute capability 8.0, the card has {card / 10}" if card < 80 else None
    if card >= 80 and flash_attention_version(card) is None:
        packages = {9: "flash-attn-3 (module flash_attn_interface)", 8: "flash-attn (module flash_attn)"}
        reasons["fa"] = f"it needs the package {packages.get(card // 10, 'flash-attn-4 (module flash_attn.cute)')}"
    reasons["fi"] = reasons["fi"] or flashinfer or triton
    reasons["trtllm"] = flashinfer or triton
    if card // 10 not in (9, 10, 12):
        reasons["trtllm"] = f"it needs compute capability 9.0, 10.x or 12.x, the card has {card / 10}"
    reasons["triton"] = triton
    return reasons


def refusal(name: str, shape: Shape) -> str | None:
    """Why a backend cannot compute attention of this shape, with what it can; or None."""
    page, dim = shape.page_size, shape.head_dim
    rules: dict[str, tuple[tuple[bool, str], ...]] = {
        "fa": ((dim <= 256 and dim % 8 == 0, "head dimensions that are a multiple of 8, up to 256"),),
        "fi": (
            (page & (page - 1) == 0, "a --page-size that is a power of two"),
            (dim in (64, 128, 256), "head dimensions 64, 128 and 256"),
        ),
        "trtllm": (
            (page in (16, 32, 64), "a --page-size of 16, 32 or 64"),
            (dim <= 256 and dim % 16 == 0, "head dimensions that are a multiple of 16, up to 256"),
        ),
        "triton": ((16 <= dim <= 256 and dim % 16 == 0, "head dimensions that are a multiple of 16, up to 256"),),
        "torch": (),
    }
    if name in ("fa", "fi", "trtllm") and shape.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {str(shape.dtype).removeprefix('torch.')}"
    for holds, rule in rules[name]:
        if not holds:
            return f"it takes {rule}, not {page if 'page' in rule else dim}"
    return None


def choose(pair: str, shape: Shape, available: Mapping[str, str | None], card: int) -> Choice:
    """The backends that `--attn pair` means: `auto`, one name, or `prefill,decode`. Pure.

    Raises ConfigError for a name that cannot run here or with this shape, saying what can.
    """
    reasons = {name: available[name] or refusal(name, shape) for name in BACKENDS}
    if pair == "auto":
        return _automatic(reasons, card)
    prefill, decode = pair.split(",") if "," in pair else (pair, pair)
    for name in (prefill, decode):
        if reason := reasons[name]:
            works = ", ".join(other for other in BACKENDS if reasons[other] is None)
            raise ConfigError(f"--attn {pair}: {name} cannot be used, {reason}; what works here: {works}")
    return Choice(prefill, decode, "as asked for")


def _automatic(reasons: Mapping[str, str | None], card: int) -> Choice:
    works = [name for name in BACKENDS if reasons[name] is None]
    missing = "; ".join(f"{name} is out, {reason}" for name, reason in reasons.items() if reason and card)
    prefill: str = next(name for name in ("fa", "fi", "triton", "torch") if name in works)
    if card // 10 == 9:  # as benchmark/attention.py measures; triton's decode needs no work on the host
        decode = "triton" if "triton" in works else prefill
        why = "the fastest measured on Hopper"
    else:
        decode = next((name for name in ("trtllm", "fi") if name in works), prefill)
        why = f"what works best on compute capability {card / 10}" if card else "the CPU's backend"
    return Choice(prefill, decode, f"{why}; {missing}" if missing else why)


def make_attention(pair: str, shape: Shape, device: torch.device) -> tuple[Attention, Choice]:
    """The backends for `--attn pair`, ready, with what was chosen. Raises ConfigError as `choose` does."""
    card = capability(device)
    choice = choose(pair, shape, available_backends(device), card)
    made: dict[str, AttentionBackend] = {}

    def make(name: str, for_prefill: bool = False) -> AttentionBackend:
        if name not in made:
            made[name] = _make(name, shape, device, card)
        if name == "trtllm" and for_prefill and card // 10 != 10:
            if reason := refusal("fi", shape):
                raise ConfigError(f"--attn {pair}: prefill of trtllm goes through FlashInfer here, and {reason}")
            return make("fi")
        return made[name]

    return Attention(make(choice.prefill, for_prefill=True), make(choice.decode)), choice


def _make(name: str, shape: Shape, device: torch.device, card: int) -> AttentionBackend:
    if name == "fa":
        from minisgl.gpu.attention.flash_attn import FlashAttention

        version = flash_attention_version(card)
        assert version is not None
        return FlashAttention(version, shape.page_size)
    if name == "fi":
        from minisgl.gpu.attention.flashinfer import FlashInfer

        return FlashInfer(device)
    if name == "trtllm":
        from minisgl.gpu.attention.trtllm import TensorRTLLM

        return TensorRTLLM(device)
    if name == "triton":
        from minisgl.gpu.attention.triton import TritonAttention

        return TritonAttention(device)
    return TorchAttention()
