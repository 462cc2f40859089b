"""What a model is: its `config.json`, of transformers' version 4 or 5, in one form for all architectures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from minisgl.errors import ModelError

FP8_BLOCK = 128  # the side of a block of a weight that shares a scale
CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16")
MAX_LAYERS, MAX_EXPERTS = 10_000, 10_000
MAX_COUNT = 2**31 - 1
MAX_JSON_BYTES = 256 * 2**20
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding (RoFormer, arXiv 2104.09864): pair i of a head's dimensions turns by
    theta ** (-2i / head_dim) / divisors[i] radians a token, and cos and sin are multiplied by `scale`.
    """

    theta: float
    divisors: tuple[float, ...] = ()  # (head_dim / 2,), for contexts longer than the original one; or none
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Sparse layers: a router picks `top_k` of `num_experts` MLPs of `width` for each token."""

    num_experts: int
    top_k: int
    width: int
    norm_topk_prob: bool  # the chosen probabilities are scaled to add up to 1
    layers: tuple[bool, ...]  # which ones are sparse


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything the decoder must know of a model but its weights."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Rope
    windows: tuple[int, ...]  # of each layer: 0 is full attention, w lets a token see itself and the w - 1 before it
    moe: Moe | None
    max_position: int  # tokens
    checkpoint_dtype: str  # one of CHECKPOINT_DTYPES
    fp8: bool = False  # matrices of the checkpoint are in FP8


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one architecture differs from Llama, and the defaults of the transformers configuration of its name."""

    model_type: str
    max_position: int
    kv_heads: int | None = None  # as many as query heads
    head_dim: int | None = None  # hidden_size / heads
    bias_fields: bool = False  # a config field decides about biases
    mlp_bias_field: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: Literal["none", "all", "layers"] = "none"  # alike in all layers, or of each layer
    use_window_field: bool = True
    moe: bool = False


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": Architecture(model_type="llama", max_position=2048, bias_fields=True, mlp_bias_field=True),
        "MistralForCausalLM": Architecture(
            model_type="mistral", max_position=131072, kv_heads=8, windows="all", use_window_field=False
        ),
        "Qwen2ForCausalLM": Architecture(
            model_type="qwen2", max_position=32768, kv_heads=32, qkv_bias=True, windows="layers"
        ),
        "Qwen3ForCausalLM": Architecture(
            model_type="qwen3", max_position=32768, kv_heads=32, head_dim=128, bias_fields=True, qk_norm=True,
            windows="layers",
        ),
        "Qwen3MoeForCausalLM": Architecture(
            model_type="qwen3_moe", max_position=32768, kv_heads=4, bias_fields=True, qk_norm=True, windows="all",
            moe=True,
        ),
    }
)  # fmt: skip


def read_spec(folder: Path) -> ModelSpec:
    """Read `config.json` from a model folder. Raises ModelError naming file and field."""
    path = folder / "config.json"
    config = Fields(read_json(path), str(path))
    names = config.items("architectures", str, [])
    if not names:
        model_type = config.text("model_type")
        names = [name for name, row in ARCHITECTURES.items() if row.model_type == model_type] or [model_type]
    if (row := ARCHITECTURES.get(names[0])) is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{path}: architecture {names[0]} is not supported; those that are: {known}")
    if (activation := config.text("hidden_act", "silu")) != "silu":
        raise ModelError(f"{path}: hidden_act {activation!r} is not supported; silu is")
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    absent = "num_key_value_heads" not in config.values
    num_kv_heads = config.integer("num_key_value_heads", (absent and row.kv_heads) or num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of the {num_heads} query heads")
    if "head_dim" not in config and row.head_dim is None and hidden_size % num_heads:
        raise config.error("hidden_size", f"a multiple of the {num_heads} heads where head_dim is not given")
    head_dim = config.integer("head_dim", row.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", "even, for the rotary embedding")
    max_position = config.integer("max_position_embeddings", row.max_position)
    bias = row.bias_fields and config.flag("attention_bias", False)
    dtype_field = "dtype" if "dtype" in config else "torch_dtype"
    dtype = config.text(dtype_field, "float32").removeprefix("torch.")
    if dtype not in CHECKPOINT_DTYPES:
        raise config.error(dtype_field, f"one of {', '.join(CHECKPOINT_DTYPES)}")
    return ModelSpec(
        architecture=names[0],
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        rms_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=row.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=row.mlp_bias_field and config.flag("mlp_bias", False),
        qk_norm=row.qk_norm,
        rope=read_rope(config, head_dim, max_position),
        windows=_windows(config, row, num_layers),
        moe=_moe(config, num_layers) if row.moe else None,
        max_position=max_position,
        checkpoint_dtype=dtype,
        fp8="quantization_config" in config and _check_fp8(config.section("quantization_config")),
    )


def _windows(config: Fields, row: Architecture, num_layers: int) -> tuple[int, ...]:
    if row.windows == "none" or (row.use_window_field and not config.flag("use_sliding_window", False)):
        return (0,) * num_layers
    no_window = "sliding_window" in config.values and config.values["sliding_window"] is None
    window = 0 if no_window else config.integer("sliding_window", 4096)
    if row.windows == "all":
        return (window,) * num_layers
    if "layer_types" not in config:
        first = config.integer("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    kinds = config.items("layer_types", str)
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise config.error("layer_types", f"{num_layers} times full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _moe(config: Fields, num_layers: int) -> Moe | None:
    field = "num_experts" if "num_experts" in config else "num_local_experts"
    num_experts = config.integer(field, least=0, most=MAX_EXPERTS)
    step = config.integer("decoder_sparse_step", 1)
    dense = set(config.items("mlp_only_layers", int, []))
    layers = tuple(num_experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    if not any(layers):
        return None
    top_k = config.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise config.error("num_experts_per_tok", f"at most the {num_experts} experts")
    width, norm = config.integer("moe_intermediate_size"), config.flag("norm_topk_prob", False)
    return Moe(num_experts=num_experts, top_k=top_k, width=width, norm_topk_prob=norm, layers=layers)


def _check_fp8(quantization: Fields) -> bool:
    """True for weights in FP8: of transformers' `fp8`, and of compressed-tensors. Raises ModelError for others."""
    method, scheme = quantization.text("quant_method"), ""
    if method == "fp8":
        block = quantization.values.get("weight_block_size")
        scheme = "" if block in (None, [FP8_BLOCK, FP8_BLOCK]) else f"blocks of {block}"
    elif method == "compressed-tensors":
        groups = quantization.section("config_groups")
        for group in map(groups.section, groups.values):
            weights = group.section("weights", {}).values
            inputs = group.section("input_activations", {}).values
            kinds = [(part.get("type"), part.get("num_bits")) for part in (weights, inputs) if part]
            strategy, block = weights.get("strategy"), weights.get("block_structure")
            in_blocks = block in ([FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}")
            if set(kinds) != {("float", 8)} or not (in_blocks or strategy in ("tensor", "channel")):
                scheme = f"{kinds}, strategy {strategy}, blocks {block}"
    else:
        scheme = "not FP8"
    if scheme:
        readable = f"fp8 with blocks of {FP8_BLOCK} x {FP8_BLOCK} or one scale a matrix, compressed-tensors in FP8"
        readable += " with a scale a matrix, a channel or such a block, and GGUF files"
        found = f"the checkpoint is quantised ({method}, {scheme})"
        raise ModelError(f"{quantization.where}: {found}; what can be read: {readable}")
    return True


def read_rope(config: Fields, head_dim: int, max_position: int) -> Rope:
    """The rope of a `config.json`, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    `linear` divides every frequency by `factor`. `llama3` keeps those that turn `high_freq_factor` times or more over
    the original context, divides those that turn `low_freq_factor` times or less, and blends between them.
    """
    rope = config.section("rope_scaling" if "rope_scaling" in config else "rope_parameters", {})
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ModelError(f"{rope.where}: rope parameters per layer type are not supported")
    for fields in (config, rope):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{fields.where}: partial_rotary_factor other than 1 is not supported")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    if theta <= 1.0:
        raise ModelError(f"{rope.where}: rope_theta must be above 1, got {theta}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(f"{rope.where}: rope kind {kind!r} is not supported; those that are: {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, divisors=(rope.number("factor"),) * (head_dim // 2))
    key = "original_max_position_embeddings"
    original = config.integer(key) if key in config else rope.integer(key, max_position)
    scale = 1.0
    if kind == "llama3":
        factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"larger than low_freq_factor ({low})")
        turns = (original * theta ** (-i / head_dim) / (2 * math.pi) for i in range(0, head_dim, 2))
        kept = [(turn - low) / (high - low) for turn in turns]
    else:
        factor = rope.number("factor", max_position / original)
        kept, scale = _yarn_ramp(rope, theta, head_dim, original), _yarn_scale(rope, factor)
    shares = [min(max(share, 0.0), 1.0) for share in kept]
    divisors = tuple(1.0 / (share + (1.0 - share) / factor) for share in shares)
    return Rope(theta=theta, divisors=divisors, scale=scale)


def _yarn_ramp(rope: Fields, theta: float, head_dim: int, original: int) -> list[float]:
    """What is kept of each pair's frequency: NTK-by-parts (arXiv 2309.00071, section 3.2), from `beta_fast` to
    `beta_slow` turns over the original context, linear in the number of the dimension.
    """

    def dimension(turns: float) -> float:  # of the pair that turns so often over the original context
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.number("beta_fast", 32.0)), dimension(rope.number("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return [1.0 - (i - low) / max(high - low, 0.001) for i in range(head_dim // 2)]


def _yarn_scale(rope: Fields, factor: float) -> float:
    """What yarn scales cos and sin by: the square root of its attention temperature's inverse."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if "attention_factor" in rope:
        return rope.number("attention_factor")
    if "mscale" in rope and "mscale_all_dim" in rope:
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)


def require_file(path: Path, size: int = len(LFS_POINTER)) -> bytes:
    """A file's first bytes. Raises ModelError for what is no regular file, or what Git leaves in its place."""
    try:
        if not path.is_file():  # to open a FIFO would wait for its writer
            raise ModelError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            start = file.read(size)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    if start.startswith(LFS_POINTER):
        raise ModelError(f"{path}: a Git LFS pointer, not the file it stands for, which `git lfs pull` fetches")
    return start


def read_small(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a file. Raises ModelError naming it when it is missing, no regular file or larger than `most`."""
    if len(data := require_file(path, most + 1)) > most:
        raise ModelError(f"{path}: larger than {most} bytes, which no description of a model is")
    return data


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ModelError naming the file when it cannot be read or is not JSON."""
    try:
        return json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error


def optional_fields(path: Path) -> Fields:
    """Those of a JSON file, none where there is no such file. Raises ModelError as `read_json`."""
    return Fields(read_json(path) if path.exists() else {}, str(path))


_REQUIRED: Any = object()


class Fields:
    """A JSON object, called `where` in errors, whose fields are read with a type.

    Methods raise ModelError naming the field when it is ill-typed, or missing or null without a default. Integers fit
    31 bits, numbers are positive and finite.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ModelError(f"{where}: must be a JSON object, got {values!r:.60}")
        self.values: dict[str, Any] = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, rule: str) -> ModelError:
        return ModelError(f"{self.where}: {name} must be {rule}, got {self.values.get(name)!r:.60}")

    def _read(self, name: str, default: Any, rule: str, is_valid: Callable[[Any], bool]) -> Any:
        if name not in self:
            if default is _REQUIRED:
                raise ModelError(f"{self.where}: the field {name} is missing")
            return default
        if not is_valid(self.values[name]):
            raise self.error(name, rule)
        return self.values[name]

    def integer(self, name: str, default: int = _REQUIRED, *, least: int = 1, most: int = MAX_COUNT) -> int:
        rule = f"an integer of at least {least} and at most {most}"
        return int(self._read(name, default, rule, lambda x: type(x) is int and least <= x <= most))

    def number(self, name: str, default: float = _REQUIRED) -> float:
        rule = "a positive number"
        return float(self._read(name, default, rule, lambda x: type(x) in (int, float) and 0 < x <= 1e308))

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        return bool(self._read(name, default, "true or false", lambda x: type(x) is bool))

    def text(self, name: str, default: str = _REQUIRED) -> str:
        return str(self._read(name, default, "a string", lambda x: type(x) is str))

    def items(self, name: str, kind: type, default: list[Any] = _REQUIRED) -> list[Any]:
        rule = f"a list of {kind.__name__}"
        return list(self._read(name, default, rule, lambda x: type(x) is list and all(type(i) is kind for i in x)))

    def section(self, name: str, default: Mapping[str, Any] = _REQUIRED) -> Fields:
        return Fields(self._read(name, default, "a JSON object", lambda x: True), f"{self.where}: {name}")
