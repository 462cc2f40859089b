"""Small random models saved by transformers, tokenizer and all, for tests that start from a folder."""

from pathlib import Path
from typing import Any

import torch
import transformers

from helpers.tiny_tokenizers import write_tokenizer

SIZES = {
    "vocab_size": 410, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "eos_token_id": 1,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, **MOE}),
}


def random_model(kind: str, std: float = 0.1, **config: Any) -> Any:
    """A model of transformers whose answers depend on its prompts: noise in every parameter, norms about 1."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0, 0.2) if "norm" in name else value.normal_(0.0, 1.0 if "embed" in name else std)
    return model


def save_model(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A model of this architecture and its tokenizer in `folder`, which is returned."""
    kind, extra = ARCHITECTURES[name]
    random_model(kind, **{**SIZES, **extra, **changes}).save_pretrained(folder)
    return write_tokenizer(folder)
