"""The weights of a decoder: made up, or read from safetensors in Hugging Face's layout, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisgl.core.model_config import Fields, ModelSpec, read_json
from minisgl.errors import ModelError

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
BIAS_STD = 0.02
BLOCK_OUTPUTS = ("o", "down", "expert_down")

Progress = Callable[[int, int], None]
"""Called with how many elements were read just now, and how many there are in all."""


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
    folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device, progress: Progress | None = None,
    sharder: Sharder | None = None,
) -> Weights:  # fmt: skip
    """Read a folder's safetensors into tensors of `dtype` on `device`, one checkpoint tensor at a time.

    With `sharder` only a rank's shard of each is read. Everything is checked against `spec` before anything is
    allocated. Raises ModelError naming file and tensor.
    """
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        plan = [(parameter, parameter.sources_in(checkpoint)) for parameter in parameters(spec)]
        for _, sources in plan:
            for source in sources:
                checkpoint.check(source.name, source.shape)
        checkpoint.check_complete({source.name for _, sources in plan for source in sources})
        total = held_elements(spec, sharder)
        tensors: dict[tuple[int | None, str], Tensor] = {}
        for parameter, sources in plan:
            shard = shard_of(parameter, sharder)
            make = torch.zeros if shard.padding else torch.empty
            tensor = make(shard.shape(parameter.shape), dtype=dtype, device=device)
            for source in sources:
                for part in shard_slices(source, shard):
                    checkpoint.read_into(source.name, tensor[part.region], part.take)
            tensors[parameter.layer, parameter.field] = tensor
            if progress is not None:
                progress(tensor.numel(), total)
    return assemble(spec, tensors)


def dummy_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0, sharder: Sharder | None = None
) -> Weights:
    """Seeded noise under which activations stay finite, of order one, at any depth and in any dtype.

    Norms are 1. Matrices have standard deviation 1 / sqrt(fan in), those that add to the residual stream a further
    1 / sqrt(2 layers), so that its variance does not grow with depth (as GPT-2 does at initialisation). With `sharder`
    each tensor is made whole and then split, so that the ranks' shards are those of one model.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for parameter in parameters(spec):
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.field.endswith("norm"):
            tensor.fill_(1.0)
        else:
            std = BIAS_STD if parameter.field.endswith("bias") else 1.0 / math.sqrt(parameter.shape[-1])
            if parameter.field in BLOCK_OUTPUTS:
                std /= math.sqrt(2 * spec.num_layers)
            tensor.normal_(0.0, std, generator=generator)
        tensors[parameter.layer, parameter.field] = shard_of(parameter, sharder).of(tensor)
    return assemble(spec, tensors)


def assemble(spec: ModelSpec, tensors: Mapping[tuple[int | None, str], Tensor]) -> Weights:
    """Weights from tensors keyed by (layer, field), as `parameters` names them; one without elements is left out."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(spec.num_layers)]
    for (layer, name), tensor in tensors.items():
        if layer is not None and tensor.numel():
            layers[layer][name] = tensor
    embedding = tensors[None, "embedding"]
    head = embedding if spec.tie_embeddings else tensors[None, "head"]
    return Weights(embedding, [LayerWeights(**layer) for layer in layers], tensors[None, "norm"], head)


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

    `layer` None is a field of Weights. `fused` is a checkpoint tensor that may hold the whole parameter instead.
    """

    layer: int | None
    field: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    fused: Source | None = None

    def sources_in(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        return (self.fused,) if self.fused is not None and self.fused.name in checkpoint else self.sources


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, in the order of the forward pass. Nothing else knows Hugging Face's names."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    found = [_stacked(None, "embedding", {"model.embed_tokens.weight": vocab}, hidden)]
    for layer in range(spec.num_layers):
        found += _attention_parameters(spec, layer)
        is_sparse = spec.moe is not None and spec.moe.layers[layer]
        found += _expert_parameters(spec, layer) if is_sparse else _mlp_parameters(spec, layer)
    found.append(_stacked(None, "norm", {"model.norm.weight": hidden}))
    if not spec.tie_embeddings:
        found.append(_stacked(None, "head", {"lm_head.weight": vocab}, hidden))
    return found


def _stacked(layer: int | None, field: str, heights: Mapping[str, int], *columns: int) -> Parameter:
    """A parameter of checkpoint tensors (height, *columns), one below the other."""
    sources, start = [], 0
    for name, height in heights.items():
        sources.append(Source(name, (height, *columns), start))
        start += height
    return Parameter(layer, field, (start, *columns), tuple(sources))


def _attention_parameters(spec: ModelSpec, layer: int) -> list[Parameter]:
    hidden, head_dim = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    prefix = f"model.layers.{layer}."
    attention = f"{prefix}self_attn."
    heights = {f"{attention}q_proj": q, f"{attention}k_proj": kv, f"{attention}v_proj": kv}
    found = [
        _stacked(layer, "input_norm", {f"{prefix}input_layernorm.weight": hidden}),
        _stacked(layer, "qkv", {f"{name}.weight": height for name, height in heights.items()}, hidden),
    ]
    if spec.qkv_bias:
        found.append(_stacked(layer, "qkv_bias", {f"{name}.bias": height for name, height in heights.items()}))
    if spec.qk_norm:
        found.append(_stacked(layer, "q_norm", {f"{attention}q_norm.weight": head_dim}))
        found.append(_stacked(layer, "k_norm", {f"{attention}k_norm.weight": head_dim}))
    found.append(_stacked(layer, "o", {f"{attention}o_proj.weight": hidden}, q))
    if spec.o_bias:
        found.append(_stacked(layer, "o_bias", {f"{attention}o_proj.bias": hidden}))
    return [*found, _stacked(layer, "post_norm", {f"{prefix}post_attention_layernorm.weight": hidden})]


def _mlp_parameters(spec: ModelSpec, layer: int) -> list[Parameter]:
    hidden, width, prefix = spec.hidden_size, spec.intermediate_size, f"model.layers.{layer}.mlp."
    found = [_stacked(layer, "gate_up", {f"{prefix}{name}_proj.weight": width for name in ("gate", "up")}, hidden)]
    if spec.mlp_bias:
        found.append(_stacked(layer, "gate_up_bias", {f"{prefix}{name}_proj.bias": width for name in ("gate", "up")}))
    found.append(_stacked(layer, "down", {f"{prefix}down_proj.weight": hidden}, width))
    if spec.mlp_bias:
        found.append(_stacked(layer, "down_bias", {f"{prefix}down_proj.bias": hidden}))
    return found


def _expert_parameters(spec: ModelSpec, layer: int) -> list[Parameter]:
    assert spec.moe is not None
    hidden, width, experts = spec.hidden_size, spec.moe.width, spec.moe.num_experts
    prefix = f"model.layers.{layer}.mlp."
    gate_up, down = [], []
    for expert in range(experts):
        name = f"{prefix}experts.{expert}."
        gate_up.append(Source(f"{name}gate_proj.weight", (width, hidden), 0, expert))
        gate_up.append(Source(f"{name}up_proj.weight", (width, hidden), width, expert))
        down.append(Source(f"{name}down_proj.weight", (hidden, width), 0, expert))
    gate_up_shape, down_shape = (experts, 2 * width, hidden), (experts, hidden, width)
    fused_gate_up = Source(f"{prefix}experts.gate_up_proj", gate_up_shape)
    fused_down = Source(f"{prefix}experts.down_proj", down_shape)
    return [
        _stacked(layer, "router", {f"{prefix}gate.weight": experts}, hidden),
        Parameter(layer, "expert_gate_up", gate_up_shape, tuple(gate_up), fused_gate_up),
        Parameter(layer, "expert_down", down_shape, tuple(down), fused_down),
    ]


@dataclass(frozen=True)
class Shard:
    """Ranges [start, stop) of one axis of a parameter, one behind the other, and then `padding` zeros.

    A shard without elements is left out of the model.
    """

    axis: int
    ranges: tuple[tuple[int, int], ...]
    padding: int = 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shard's shape, of a parameter of this shape."""
        length = sum(stop - start for start, stop in self.ranges) + self.padding
        return (*whole[: self.axis], length, *whole[self.axis + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """The shard of a whole parameter; a copy where it is not all of it."""
        shape = self.shape(tuple(whole.shape))
        if shape == whole.shape:
            return whole
        shard, reached = whole.new_zeros(shape), 0
        for start, stop in self.ranges:
            shard.narrow(self.axis, reached, stop - start).copy_(whole.narrow(self.axis, start, stop - start))
            reached += stop - start
        return shard


Sharder = Callable[[Parameter], Shard | None]
"""What a rank holds of a parameter; None: all of it."""


class ShardSlice(NamedTuple):
    """A part of a checkpoint tensor, and the region of the shard that it fills."""

    take: tuple[slice, ...]
    region: tuple[int | slice, ...]


def shard_of(parameter: Parameter, sharder: Sharder | None) -> Shard:
    """What is held of a parameter; without a sharder all of it."""
    shard = None if sharder is None else sharder(parameter)
    return shard or Shard(len(parameter.shape) - 1, ((0, parameter.shape[-1]),))


def held_elements(spec: ModelSpec, sharder: Sharder | None) -> int:
    """Elements of all that is held of a model's parameters."""
    return sum(math.prod(shard_of(parameter, sharder).shape(parameter.shape)) for parameter in parameters(spec))


def shard_slices(source: Source, shard: Shard) -> list[ShardSlice]:
    """What a rank reads of a source, which is nothing when it holds none of it."""
    expert: tuple[int, ...] = () if source.expert is None else (source.expert,)
    axis = shard.axis - len(expert)
    first = source.start if axis == 0 else 0  # where the source begins on the axis that is split
    found, reached = [], 0
    for start, stop in shard.ranges:
        low, high = max(start, first), min(stop, first + source.shape[axis])
        if low < high:
            take = [slice(0, size) for size in source.shape]
            region = [slice(source.start, source.start + source.shape[0]), *take[1:]]
            take[axis] = slice(low - first, high - first)
            region[axis] = slice(reached + low - start, reached + high - start)
            found.append(ShardSlice(tuple(take), (*expert, *region)))
        reached += stop - start
    return found


class Checkpoint:
    """The tensors of a model folder by name, mapped while `stack` is open.

    Raises ModelError naming file and tensor for whatever a file lacks or claims wrongly.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}  # by tensor
        if (folder / INDEX).exists():
            self._read_index(folder / INDEX)
        else:
            self._read_all()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ModelError unless there is a floating point tensor of this name and shape."""
        path, file = self._find(name)
        stored = file.get_slice(name)
        if (found := tuple(stored.get_shape())) != shape:
            raise ModelError(f"{path}: tensor {name} has shape {found}, the config asks for {shape}")
        if (dtype := stored.get_dtype()) not in STORED_DTYPES:
            raise ModelError(f"{path}: tensor {name} is stored as {dtype}; {', '.join(STORED_DTYPES)} can be read")

    def check_complete(self, used: set[str]) -> None:
        """Raise ModelError for a weight or bias of a known module that is not in `used`: it would change the output."""
        modules = {name.rpartition(".")[0] for name in used}
        for name, file in self._file_of.items():
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "bias") and module in modules and name not in used:
                raise ModelError(f"{self.folder / file}: tensor {name} has no place in the model the config describes")

    def read_into(self, name: str, destination: Tensor, take: tuple[slice, ...]) -> None:
        """Copy a part of a tensor into `destination`, converting dtype and device; nothing else of it is read."""
        path, file = self._find(name)
        try:
            destination.copy_(file.get_slice(name)[take])
        except SafetensorError as error:
            raise ModelError(f"{path}: tensor {name}: {error}") from error

    def _find(self, name: str) -> tuple[Path, Any]:
        if name not in self._file_of:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        file = self._file_of[name]
        return self.folder / file, self._files[file]

    def _read_index(self, path: Path) -> None:
        self._file_of = Fields(read_json(path), str(path)).section("weight_map").values
        for name, file in self._file_of.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{path}: tensor {name}: {file!r} is not the name of a safetensors file beside it")
        names = {file: self._open(file) for file in dict.fromkeys(self._file_of.values())}
        for name, file in self._file_of.items():
            if name not in names[file]:
                raise ModelError(f"{self.folder / file}: tensor {name} is missing, the index promises it")

    def _read_all(self) -> None:
        single = self.folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(self._why_nothing())
        for path in paths:
            for name in self._open(path.name):
                if name in self._file_of:
                    raise ModelError(f"{path}: tensor {name} is also in {self._file_of[name]}")
                self._file_of[name] = path.name

    def _open(self, file: str) -> frozenset[str]:
        """Map a file; the names of its tensors."""
        path = self.folder / file
        try:
            self._files[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except SafetensorError as error:
            raise ModelError(f"{path}: not a complete safetensors file: {error}") from error
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from error
        return frozenset(self._files[file].keys())

    def _why_nothing(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder}: no such folder"
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            return f"{self.folder}: {pickles[0]} is a pickle, which can run any code and is never read; use safetensors"
        return f"{self.folder}: no *.safetensors file"
