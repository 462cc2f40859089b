"""Small models for tests, described by how they differ from one."""

import dataclasses
from typing import Any

from minisgl.core.model_config import ModelSpec, Rope

EOS = 5
# Qwen3 in small: two query heads on a KV head.
TINY = ModelSpec(
    architecture="Qwen3ForCausalLM", vocab_size=211, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, intermediate_size=48, rms_eps=1e-6, tie_embeddings=False, qkv_bias=False, o_bias=False,
    mlp_bias=False, qk_norm=True, rope=Rope(theta=10000.0), windows=(0, 0), moe=None,
    max_position=128, checkpoint_dtype="float32",
)  # fmt: skip
TINY_LLAMA = dataclasses.replace(
    TINY, architecture="LlamaForCausalLM", vocab_size=97, head_dim=8, qk_norm=False, max_position=64
)


def tiny_spec(**changes: Any) -> ModelSpec:
    """TINY with these fields changed."""
    return dataclasses.replace(TINY, **changes)
