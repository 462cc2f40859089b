"""The weights of a decoder as tensors, read from a checkpoint or made up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisgl.models.checkpoint import Checkpoint
from minisgl.models.parameters import Parameter, Source, parameters
from minisgl.models.progress import progress_bar
from minisgl.models.slices import Cut, Keep, pieces
from minisgl.models.spec import ModelSpec

BIAS_STD = 0.02
BLOCK_OUTPUTS = ("o", "down", "expert_down")


@dataclass
class LayerWeights:
    """One layer. Matrices are (out, in) as in checkpoints; D hidden, H heads, K KV heads, I and Im MLP widths.

    A dense layer has `gate_up` and `down`, a sparse one `router`, `expert_gate_up` and `expert_down`.
    """

    input_norm: Tensor  # (D,)
    qkv: Tensor  # ((H + 2K) * head_dim, D)
    o: Tensor  # (D, H * head_dim)
    post_norm: Tensor  # (D,)
    qkv_bias: Tensor | None = None  # ((H + 2K) * head_dim,)
    o_bias: Tensor | None = None  # (D,)
    q_norm: Tensor | None = None  # (head_dim,)
    k_norm: Tensor | None = None  # (head_dim,)
    gate_up: Tensor | None = None  # (2I, D), gate first
    gate_up_bias: Tensor | None = None  # (2I,)
    down: Tensor | None = None  # (D, I)
    down_bias: Tensor | None = None  # (D,)
    router: Tensor | None = None  # (E, D)
    expert_gate_up: Tensor | None = None  # (E, 2Im, D), gate first
    expert_down: Tensor | None = None  # (E, D, Im)


@dataclass
class Weights:
    """All of a decoder's weights; `head` is the very tensor `embedding` where the model ties them."""

    embedding: Tensor  # (V, D)
    layers: list[LayerWeights]
    norm: Tensor  # (D,)
    head: Tensor  # (V, D)


def load_weights(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
    cut: Cut | None = None,
) -> Weights:
    """Read a folder's safetensors into tensors of `dtype` on `device`, one checkpoint tensor at a time.

    With `cut` only what it keeps of each is read. Everything is checked against `spec` before anything is allocated.
    Raises ModelError naming file and tensor.
    """
    with Checkpoint(folder) as checkpoint:
        plan = [(parameter, _sources(parameter, checkpoint)) for parameter in parameters(spec)]
        for _, sources in plan:
            for source in sources:
                checkpoint.check(source.name, source.shape)
        checkpoint.check_complete({source.name for _, sources in plan for source in sources})
        tensors: dict[tuple[int | None, str], Tensor] = {}
        total = sum(math.prod(_shape(parameter, _keep(parameter, cut))) for parameter, _ in plan)
        with progress_bar("Loading weights", total, enabled=progress) as advance:
            for parameter, sources in plan:
                keep = _keep(parameter, cut)
                make = torch.zeros if keep is not None and keep.padding else torch.empty
                shard = make(_shape(parameter, keep), dtype=dtype, device=device)
                for source in sources:
                    for piece in pieces(source, keep):
                        checkpoint.read_into(source.name, shard[piece.region], piece.take)
                        advance(piece.numel)
                tensors[parameter.layer, parameter.field] = shard
    return assemble(spec, tensors)


def _keep(parameter: Parameter, cut: Cut | None) -> Keep | None:
    return None if cut is None else cut(parameter)


def _shape(parameter: Parameter, keep: Keep | None) -> tuple[int, ...]:
    return parameter.shape if keep is None else keep.shape(parameter.shape)


def _sources(parameter: Parameter, checkpoint: Checkpoint) -> tuple[Source, ...]:
    if parameter.fused is not None and parameter.fused.name in checkpoint:
        return (parameter.fused,)
    return parameter.sources


def assemble(spec: ModelSpec, tensors: dict[tuple[int | None, str], Tensor]) -> Weights:
    """Weights from tensors keyed by (layer, field), as `parameters` names them; one without elements is left out."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(spec.num_layers)]
    for (layer, name), tensor in tensors.items():
        if layer is not None and tensor.numel():
            layers[layer][name] = tensor
    embedding = tensors[None, "embedding"]
    head = embedding if spec.tie_embeddings else tensors[None, "head"]
    return Weights(embedding, [LayerWeights(**layer) for layer in layers], tensors[None, "norm"], head)


def dummy_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0, cut: Cut | None = None
) -> Weights:
    """Seeded noise under which activations stay finite, of order one, at any depth and in any dtype.

    Norms are 1. Matrices have standard deviation 1 / sqrt(fan in), those that add to the residual stream a further
    1 / sqrt(2 layers), so that its variance does not grow with depth (as GPT-2 does at initialisation). With `cut`
    each tensor is made whole and then cut, so that the ranks' shards are those of one model.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for parameter in parameters(spec):
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.field.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, _std(parameter, spec), generator=generator)
        keep = _keep(parameter, cut)
        tensors[parameter.layer, parameter.field] = tensor if keep is None else keep.of(tensor)
    return assemble(spec, tensors)


def _std(parameter: Parameter, spec: ModelSpec) -> float:
    if parameter.field.endswith("bias"):
        return BIAS_STD
    std = 1.0 / math.sqrt(parameter.shape[-1])
    return std / math.sqrt(2 * spec.num_layers) if parameter.field in BLOCK_OUTPUTS else std
