"""Which checkpoint tensors each of our tensors is made of: the one place that knows Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minisgl.models.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor and where it goes: `parameter[expert]` (the whole where None), from row `start` on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class Parameter:
    """One tensor of ours: its field, its shape, and its sources in order, concatenated along their first dimension.

    `layer` None is a field of Weights. `fused` is a checkpoint tensor that holds the whole parameter already.
    """

    layer: int | None
    field: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    fused: Source | None = None


def rows(name: str, *parts: tuple[str, tuple[int, ...]], expert: int | None = None) -> tuple[Source, ...]:
    """Sources `name.format(part)` one below the other, in the order given."""
    sources, start = [], 0
    for part, shape in parts:
        sources.append(Source(name.format(part), shape, start, expert))
        start += shape[0]
    return tuple(sources)


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, in the order of the forward pass."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    found = [_one(None, "embedding", "model.embed_tokens.weight", vocab, hidden)]
    for layer in range(spec.num_layers):
        found += _attention(spec, layer)
        found += _experts(spec, layer) if spec.moe is not None and spec.moe.layers[layer] else _mlp(spec, layer)
    found.append(_one(None, "norm", "model.norm.weight", hidden))
    if not spec.tie_embeddings:
        found.append(_one(None, "head", "lm_head.weight", vocab, hidden))
    return found


def _one(layer: int | None, field: str, name: str, *shape: int) -> Parameter:
    return Parameter(layer, field, shape, (Source(name, shape),))


def _attention(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    hidden, head_dim = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    prefix = f"model.layers.{layer}."
    attention = f"{prefix}self_attn."
    yield _one(layer, "input_norm", f"{prefix}input_layernorm.weight", hidden)
    heights = (("q", q), ("k", kv), ("v", kv))
    weights = rows(attention + "{}_proj.weight", *((part, (height, hidden)) for part, height in heights))
    yield Parameter(layer, "qkv", (q + 2 * kv, hidden), weights)
    if spec.qkv_bias:
        biases = rows(attention + "{}_proj.bias", *((part, (height,)) for part, height in heights))
        yield Parameter(layer, "qkv_bias", (q + 2 * kv,), biases)
    if spec.qk_norm:
        yield _one(layer, "q_norm", f"{attention}q_norm.weight", head_dim)
        yield _one(layer, "k_norm", f"{attention}k_norm.weight", head_dim)
    yield _one(layer, "o", f"{attention}o_proj.weight", hidden, q)
    if spec.o_bias:
        yield _one(layer, "o_bias", f"{attention}o_proj.bias", hidden)
    yield _one(layer, "post_norm", f"{prefix}post_attention_layernorm.weight", hidden)


def _mlp(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    hidden, width = spec.hidden_size, spec.intermediate_size
    prefix = f"model.layers.{layer}.mlp."
    weights = rows(prefix + "{}_proj.weight", ("gate", (width, hidden)), ("up", (width, hidden)))
    yield Parameter(layer, "gate_up", (2 * width, hidden), weights)
    if spec.mlp_bias:
        biases = rows(prefix + "{}_proj.bias", ("gate", (width,)), ("up", (width,)))
        yield Parameter(layer, "gate_up_bias", (2 * width,), biases)
    yield _one(layer, "down", f"{prefix}down_proj.weight", hidden, width)
    if spec.mlp_bias:
        yield _one(layer, "down_bias", f"{prefix}down_proj.bias", hidden)


def _experts(spec: ModelSpec, layer: int) -> Iterator[Parameter]:
    assert spec.moe is not None
    hidden, width, experts = spec.hidden_size, spec.moe.width, spec.moe.num_experts
    prefix = f"model.layers.{layer}.mlp."
    yield _one(layer, "router", f"{prefix}gate.weight", experts, hidden)
    gate_up: list[Source] = []
    down: list[Source] = []
    for expert in range(experts):
        name = f"{prefix}experts.{expert}." + "{}_proj.weight"
        gate_up += rows(name, ("gate", (width, hidden)), ("up", (width, hidden)), expert=expert)
        down += rows(name, ("down", (hidden, width)), expert=expert)
    shape = (experts, 2 * width, hidden)
    fused = Source(f"{prefix}experts.gate_up_proj", shape)
    yield Parameter(layer, "expert_gate_up", shape, tuple(gate_up), fused)
    shape = (experts, hidden, width)
    fused = Source(f"{prefix}experts.down_proj", shape)
    yield Parameter(layer, "expert_down", shape, tuple(down), fused)
