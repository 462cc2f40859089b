"""What a model is: the facts of its `config.json` in one form, whatever the architecture's name.

An architecture is a row of `ARCHITECTURES`; the defaults in it are those of the `transformers`
configuration class of the same name, which decide when a checkpoint leaves a field out. Both of its
forms are read: version 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from minisgl.errors import ModelError
from minisgl.models.eos import read_eos_token_ids
from minisgl.models.fields import Fields, read_json
from minisgl.models.rope import Rope, read_rope

CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16")
MAX_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Sparse layers: a router picks `top_k` of `num_experts` MLPs of `width` for each token.

    `layers[i]` says whether layer i is sparse; `norm_topk_prob` whether the chosen probabilities are scaled to sum 1.
    """

    num_experts: int
    top_k: int
    width: int
    norm_topk_prob: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything the decoder must know of a model but its weights.

    `windows[i]` is the attention window of layer i: 0 is full attention, w lets a token see itself and the w-1
    before it. `max_position` counts tokens. `checkpoint_dtype` is one of CHECKPOINT_DTYPES.
    """

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
    windows: tuple[int, ...]
    moe: Moe | None
    max_position: int
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one architecture differs from Llama, and what it assumes where its config is silent.

    `kv_heads` None means as many as query heads, `head_dim` None hidden_size / heads. A config field decides about
    biases where `bias_fields` is true. `windows`: no layer has one, all layers share one, or layer_types tells.
    """

    model_type: str
    max_position: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias_fields: bool = False
    mlp_bias_field: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: str = "none"
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
    """Read `config.json`, and the EOS ids beside it, from a model folder in Hugging Face's layout.

    Raises ModelError naming file and field for what is missing, ill-typed, unknown or contradictory.
    """
    path = folder / "config.json"
    config = Fields(read_json(path), str(path))
    name, row = _architecture(config)
    if "quantization_config" in config:
        method = config.section("quantization_config").values.get("quant_method", "unknown")
        raise ModelError(
            f"{path}: the checkpoint is quantised ({method}); safetensors in float32, float16 or bfloat16, "
            "and GGUF files, can be read"
        )
    if (activation := config.text("hidden_act", "silu")) != "silu":
        raise ModelError(f"{path}: hidden_act {activation!r} is not supported; silu is")
    num_layers = config.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise config.error("num_hidden_layers", f"at most {MAX_LAYERS}")
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads = _kv_heads(config, row, num_heads)
    vocab_size = config.integer("vocab_size")
    max_position = config.integer("max_position_embeddings", row.max_position)
    bias = row.bias_fields and config.flag("attention_bias", False)
    return ModelSpec(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(config, row, hidden_size, num_heads),
        intermediate_size=config.integer("intermediate_size"),
        rms_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=row.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=row.mlp_bias_field and config.flag("mlp_bias", False),
        qk_norm=row.qk_norm,
        rope=read_rope(config, max_position),
        windows=_windows(config, row, num_layers),
        moe=_moe(config, num_layers) if row.moe else None,
        max_position=max_position,
        eos_token_ids=read_eos_token_ids(folder, config, vocab_size),
        checkpoint_dtype=_dtype(config),
    )


def _architecture(config: Fields) -> tuple[str, Architecture]:
    names = config.items("architectures", str, [])
    if not names:
        model_type = config.text("model_type")
        names = [name for name, row in ARCHITECTURES.items() if row.model_type == model_type] or [model_type]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"{config.where}: architecture {names[0]} is not supported; those that are: {', '.join(ARCHITECTURES)}"
        )
    return names[0], ARCHITECTURES[names[0]]


def _kv_heads(config: Fields, row: Architecture, num_heads: int) -> int:
    absent = "num_key_value_heads" not in config.values
    num_kv_heads = config.integer("num_key_value_heads", row.kv_heads if absent and row.kv_heads else num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of the {num_heads} query heads")
    return num_kv_heads


def _head_dim(config: Fields, row: Architecture, hidden_size: int, num_heads: int) -> int:
    if "head_dim" not in config and row.head_dim is None and hidden_size % num_heads:
        raise config.error("hidden_size", f"a multiple of the {num_heads} heads where head_dim is not given")
    head_dim = config.integer("head_dim", row.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", "even, for the rotary embedding")
    return head_dim


def _windows(config: Fields, row: Architecture, num_layers: int) -> tuple[int, ...]:
    if row.windows == "none" or (row.use_window_field and not config.flag("use_sliding_window", False)):
        return (0,) * num_layers
    window = config.integer_or_null("sliding_window", 4096) or 0
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
    num_experts = config.integer("num_experts" if "num_experts" in config else "num_local_experts", least=0)
    step = config.integer("decoder_sparse_step", 1)
    dense = set(config.items("mlp_only_layers", int, []))
    layers = tuple(num_experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(num_layers))
    if not any(layers):
        return None
    top_k = config.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise config.error("num_experts_per_tok", f"at most the {num_experts} experts")
    width = config.integer("moe_intermediate_size")
    norm = config.flag("norm_topk_prob", False)
    return Moe(num_experts=num_experts, top_k=top_k, width=width, norm_topk_prob=norm, layers=layers)


def _dtype(config: Fields) -> str:
    name = "dtype" if "dtype" in config else "torch_dtype"
    dtype = config.text(name, "float32").removeprefix("torch.")
    if dtype not in CHECKPOINT_DTYPES:
        raise config.error(name, f"one of {', '.join(CHECKPOINT_DTYPES)}")
    return dtype
