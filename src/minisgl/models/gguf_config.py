"""A GGUF file's metadata as the `config.json` of Hugging Face's layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minisgl.errors import ModelError
from minisgl.models.fields import Fields
from minisgl.models.gguf_file import GgufFile

MODEL_TYPES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""GGUF architecture -> Hugging Face's architecture and model type. Mistral's files mostly call themselves llama."""

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""low_freq_factor, high_freq_factor and original context of every Llama 3.1 to 3.3."""


def hf_config(file: GgufFile, dtype: str) -> dict[str, Any]:
    """The config.json of a GGUF file whose tensors will be stored as `dtype`.

    Raises ModelError for an unknown architecture and for a rotary embedding that cannot be expressed.
    """
    metadata = Fields(file.metadata, str(file.path))
    kind = metadata.text("general.architecture")
    if kind not in MODEL_TYPES:
        raise file.error(f"architecture {kind} is not supported; those that are: {', '.join(MODEL_TYPES)}")
    if kind != "qwen3moe" and metadata.integer(f"{kind}.expert_count", 0, least=0):
        raise file.error(f"architecture {kind} with experts is not supported")
    if "token_embd.weight" not in file.tensors:
        raise file.error("tensor token_embd.weight is missing")
    heads, hidden = metadata.integer(f"{kind}.attention.head_count"), metadata.integer(f"{kind}.embedding_length")
    layers, context = metadata.integer(f"{kind}.block_count"), metadata.integer(f"{kind}.context_length")
    head_dim = metadata.integer(f"{kind}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(f"{kind}.{key}", head_dim) != head_dim:
            raise metadata.error(f"{kind}.{key}", f"the key length {head_dim}")
    window = metadata.integer(f"{kind}.attention.sliding_window", 0, least=0)
    if kind == "llama" and 0 < window < context:
        kind_name = "mistral"
    else:
        kind_name = kind
    architecture, model_type = MODEL_TYPES[kind_name]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": dtype,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.integer(f"{kind}.feed_forward_length"),
        "rms_norm_eps": metadata.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": kind != "qwen2" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "use_sliding_window": False,
        "sliding_window": window if kind_name == "mistral" and window else None,
        "rope_parameters": _rope(file, metadata, kind, head_dim, context),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if kind == "qwen3moe":
        config |= {
            "num_experts": metadata.integer(f"{kind}.expert_count"),
            "num_experts_per_tok": metadata.integer(f"{kind}.expert_used_count"),
            "moe_intermediate_size": metadata.integer(f"{kind}.expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(layers) if f"blk.{i}.ffn_gate.weight" in file.tensors],
        }
    return config


def _rope(file: GgufFile, metadata: Fields, kind: str, head_dim: int, context: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": metadata.number(f"{kind}.rope.freq_base", 10000.0), "rope_type": "default"}
    prefix = f"{kind}.rope.scaling."
    scaling = metadata.text(f"{prefix}type", "linear" if f"{kind}.rope.scale_linear" in metadata else "none")
    for key, neutral in (
        ("attn_factor", 1),
        ("yarn_attn_factor", 1),
        ("yarn_ext_factor", 1),
        ("yarn_log_multiplier", 0),
    ):
        if metadata.values.get(prefix + key, neutral) != neutral:
            raise file.error(f"metadata {prefix}{key} {metadata.values[prefix + key]} is not supported")
    if "rope_freqs.weight" in file.tensors:
        if scaling != "none":
            raise file.error(f"rope scaling {scaling} together with the tensor rope_freqs.weight is not supported")
        return rope | _llama3(file, rope["rope_theta"], head_dim)
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise file.error(f"rope scaling {scaling} is not supported; none, linear and yarn are")
    rope |= {"rope_type": scaling, "factor": _factor(metadata, kind)}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = metadata.integer(f"{prefix}original_context_length", context)
        for name in ("beta_fast", "beta_slow"):
            if f"{prefix}yarn_{name}" in metadata:
                rope[name] = metadata.number(f"{prefix}yarn_{name}")
    return rope


def _factor(metadata: Fields, kind: str) -> float:
    if f"{kind}.rope.scaling.factor" in metadata:
        return metadata.number(f"{kind}.rope.scaling.factor")
    return metadata.number(f"{kind}.rope.scale_linear")


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Rope parameters from `rope_freqs.weight`, which holds what llama3 scaling divides each frequency by.

    Only the scaling factor is free: the tensor must agree with Llama 3's other constants.
    """
    divisors = file.floats("rope_freqs.weight").astype(np.float64)
    if divisors.shape != (head_dim // 2,):
        raise file.error(
            f"tensor rope_freqs.weight has shape {divisors.shape}, head size {head_dim} asks for half of it"
        )
    factor = float(divisors.max())
    wavelengths = 2 * math.pi * theta ** (2 * np.arange(head_dim // 2) / head_dim)
    smooth = np.clip((LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    if not factor >= 1.0 or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(f"{file.path}: tensor rope_freqs.weight is not the rope scaling of Llama 3, the one supported")
    if factor == 1.0:
        return {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
