"""GGUF files made on the spot from small random models of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from helpers.tiny_tokenizers import byte_level_json
from minisgl.formats.gguf import gguf_name

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **ATTENTION}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3moe": ("Qwen3Moe", MOE),
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def random_model(kind: str, vocab_size: int, **extra: Any) -> Any:
    name, options = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **extra}, vocab_size=vocab_size)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def gguf_tensors(model: Any, kind: str) -> dict[str, NDArray[np.float32]]:
    """The model's tensors under GGUF's names, in GGUF's order of rows, experts together."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.detach().float().numpy().copy()
        if ".experts." in name:
            block = f"blk.{name.split('.')[2]}."
            if name.endswith("down_proj"):
                tensors[f"{block}ffn_down_exps.weight"] = values
            else:
                gate, up = np.split(values, 2, axis=1)
                tensors |= {f"{block}ffn_gate_exps.weight": gate.copy(), f"{block}ffn_up_exps.weight": up.copy()}
            continue
        module = name.split(".")[-2]
        if kind in ("llama", "mistral") and module in ("q_proj", "k_proj"):
            heads = getattr(model.config, "num_attention_heads" if module == "q_proj" else "num_key_value_heads")
            # (head, half, pair) rows to (head, pair, half) as llama.cpp's converter leaves them.
            rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = rows.swapaxes(1, 2).reshape(values.shape)
        tensors[gguf_name(name)] = np.ascontiguousarray(values)
    return tensors


def model_metadata(model: Any, kind: str) -> dict[str, Any]:
    config = model.config
    metadata: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **{f"attention.{name}_length": config.head_dim for name in ("key", "value")},
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if kind == "qwen3moe":
        metadata |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        metadata["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{kind}.{name}": value for name, value in metadata.items()}


def tokenizer_metadata(pre: str | None = "gpt-2") -> dict[str, Any]:
    """The metadata of the small byte-level tokenizer; `</s>` is EOS, `<|im_end|>` ends a turn."""
    state = json.loads(byte_level_json())
    vocab = state["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["content"] for token in state["added_tokens"]}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": vocab["<s>"],
        "tokenizer.ggml.eos_token_id": vocab["</s>"],
        "tokenizer.ggml.eot_token_id": vocab["<|im_end|>"],
        "tokenizer.chat_template": TEMPLATE,
    }
    return metadata if pre is None else {**metadata, "tokenizer.ggml.pre": pre}


def write_gguf(
    path: Path, kind: str, entries: Mapping[str, Any], formats: Mapping[str, gguf.GGMLQuantizationType] = {}
) -> Path:
    """Write a GGUF file: arrays as tensors, the others as metadata, None not at all.

    A tensor named in `formats` is quantised, or taken as raw blocks when it is bytes.
    """
    writer = gguf.GGUFWriter(path, kind)
    for name, value in entries.items():
        if isinstance(value, np.ndarray):
            format = formats.get(name)
            raw = value if format is None or value.dtype == np.uint8 else gguf.quants.quantize(value, format)
            writer.add_tensor(name, raw, raw_dtype=format)
        elif value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path: Path, kind: str, format: str = "F32", changes: Mapping[str, Any] = {}, **config: Any) -> Any:
    """Write a random model with the small tokenizer, its matrices stored as `format`, and `changes` to its entries.

    Returns the model with the weights as they come out of the file.
    """
    tokenizer = tokenizer_metadata("qwen2" if kind.startswith("qwen") else "smollm")
    model = random_model(kind, len(tokenizer["tokenizer.ggml.tokens"]), **config)
    quantization = gguf.GGMLQuantizationType[format]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and format != "F32":
                stored = gguf.quants.quantize(parameter.numpy(), quantization)
                parameter.copy_(torch.from_numpy(np.array(gguf.dequantize(stored, quantization))))
    tensors = gguf_tensors(model, kind)
    formats = {name: quantization for name, tensor in tensors.items() if tensor.ndim > 1 and format != "F32"}
    write_gguf(path, kind, {**model_metadata(model, kind), **tokenizer, **tensors, **changes}, formats)
    return model
