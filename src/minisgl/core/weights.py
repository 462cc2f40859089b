"""The progress bar of loading and converting.

Which checkpoint tensors each of our tensors is made of: the one place that knows Hugging Face's names.

Which part of each tensor one rank of several keeps, and where in the checkpoint it lies.

Reading safetensors: one file or several with an index, tensor by tensor, never a pickle.

The weights of a decoder as tensors, read from a checkpoint or made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisgl.core.model_config import Fields, ModelSpec, read_json
from minisgl.errors import ModelError


@contextmanager
def progress_bar(title: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that goes away when done; gives the function that advances it. Nothing where not `enabled`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not enabled) as progress:
        task = progress.add_task(title, total=total)
        yield lambda steps: progress.advance(task, steps)


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


@dataclass(frozen=True)
class Keep:
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
        """A copy of the shard of a whole parameter."""
        parts = [whole.narrow(self.axis, start, stop - start) for start, stop in self.ranges]
        if self.padding:
            shape = (*whole.shape[: self.axis], self.padding, *whole.shape[self.axis + 1 :])
            parts.append(whole.new_zeros(shape))
        return torch.cat(parts, dim=self.axis) if parts else whole.new_empty(self.shape(whole.shape))


Cut = Callable[[Parameter], Keep | None]
"""What is kept of a parameter; None: all of it."""


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint tensor and the region of the shard that it fills."""

    source: Source
    take: tuple[slice, ...]
    region: tuple[int | slice, ...]

    @property
    def numel(self) -> int:
        """Elements read."""
        count = 1
        for part in self.take:
            count *= part.stop - part.start
        return count


def pieces(source: Source, keep: Keep | None) -> Iterator[Piece]:
    """What a rank reads of a source, which is nothing when it keeps none of it."""
    expert: tuple[int, ...] = () if source.expert is None else (source.expert,)
    everything = [slice(0, size) for size in source.shape]
    placed = [slice(source.start, source.start + source.shape[0]), *everything[1:]]
    if keep is None:
        yield Piece(source, tuple(everything), (*expert, *placed))
        return
    axis = keep.axis - len(expert)
    first = source.start if axis == 0 else 0  # where the source begins on the axis that is cut
    reached = 0
    for start, stop in keep.ranges:
        low, high = max(start, first), min(stop, first + source.shape[axis])
        if low < high:
            take, region = list(everything), list(placed)
            take[axis] = slice(low - first, high - first)
            region[axis] = slice(reached + low - start, reached + high - start)
            yield Piece(source, tuple(take), (*expert, *region))
        reached += stop - start


INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """The tensors of a model folder by name. A context manager: the files are mapped while it is open.

    Raises ModelError naming file and tensor for whatever a file lacks or claims wrongly.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._names: dict[str, frozenset[str]] = {}
        self._where: dict[str, str] = {}
        try:
            if (folder / INDEX).exists():
                self._open_index()
            else:
                self._open_all()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ModelError unless there is a floating point tensor of this name and shape."""
        path, file = self._find(name)
        piece = file.get_slice(name)
        if (found := tuple(piece.get_shape())) != shape:
            raise ModelError(f"{path}: tensor {name} has shape {found}, the config asks for {shape}")
        if (dtype := piece.get_dtype()) not in DTYPES:
            raise ModelError(f"{path}: tensor {name} is stored as {dtype}; {', '.join(DTYPES)} can be read")

    def check_complete(self, used: set[str]) -> None:
        """Raise ModelError for a weight or bias of a known module that is not in `used`: it would change the answer."""
        modules = {name.rpartition(".")[0] for name in used}
        for name, file in self._where.items():
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
        if name not in self._where:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        file = self._where[name]
        return self.folder / file, self._files[file]

    def _open_index(self) -> None:
        path = self.folder / INDEX
        index = Fields(read_json(path), str(path)).section("weight_map")
        for name, file in index.values.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{path}: tensor {name}: {file!r} is not the name of a safetensors file beside it")
            if name not in self._open(file):
                raise ModelError(f"{self.folder / file}: tensor {name} is missing, the index promises it")
            self._where[name] = file

    def _open_all(self) -> None:
        single = self.folder / "model.safetensors"
        paths = [single] if single.exists() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(self._why_nothing())
        for path in paths:
            for name in self._open(path.name):
                if name in self._where:
                    raise ModelError(f"{path}: tensor {name} is also in {self._where[name]}")
                self._where[name] = path.name

    def _open(self, file: str) -> frozenset[str]:
        path = self.folder / file
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise ModelError(f"{path}: not a complete safetensors file: {error}") from error
            except OSError as error:
                raise ModelError(f"{path}: {error.strerror or error}") from error
            self._names[file] = frozenset(self._files[file].keys())
        return self._names[file]

    def _why_nothing(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder}: no such folder"
        pickles = sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            return f"{self.folder}: {pickles[0]} is a pickle, which can run any code and is never read; use safetensors"
        return f"{self.folder}: no *.safetensors file"


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
