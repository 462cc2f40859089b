"""The weights of a decoder: made up, or read from safetensors in Hugging Face's layout, tensor by tensor."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisgl.core.model_config import Fields, ModelSpec, Moe, read_json, require_file
from minisgl.core.quantization import BLOCK, FP8, Fp8Weight, Weight
from minisgl.errors import NO_PANICS, ModelError, NativePanicError

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES, STORED_FP8 = ("F64", "F32", "F16", "BF16"), "F8_E4M3"
QUANTIZED = ("qkv", "o", "gate_up", "down", "expert_gate_up", "expert_down")  # the matrices that may be in FP8 or int8
SCALES = ("_scale_inv", "_scale")  # what checkpoints add to a weight's name for its scales
KV_SCALES = ("{0}_scale", "{0}_proj.{0}_scale", "{0}_proj.output_scale")  # in `self_attn`, of keys ("k") or values
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Quantize = Callable[[Tensor], Weight]
Progress = Callable[[int, int], None]  # called with the elements, or bytes, read just now and in all

logger = logging.getLogger(__name__)


@dataclass
class LayerWeights:
    """One layer. Matrices are (out, in) as in checkpoints; D hidden, H heads, K KV heads, I and Im MLP widths."""

    input_norm: Tensor  # (D,)
    qkv: Weight  # ((H + 2K) * head_dim, D)
    o: Weight  # (D, H * head_dim)
    post_norm: Tensor  # (D,)
    qkv_bias: Tensor | None = None  # ((H + 2K) * head_dim,)
    o_bias: Tensor | None = None  # (D,)
    q_norm: Tensor | None = None  # (head_dim,)
    k_norm: Tensor | None = None  # (head_dim,)
    # Of a dense layer
    gate_up: Weight | None = None  # (2I, D), gate first
    gate_up_bias: Tensor | None = None  # (2I,)
    down: Weight | None = None  # (D, I)
    down_bias: Tensor | None = None  # (D,)
    # Of a sparse layer
    router: Tensor | None = None  # (E, D)
    expert_gate_up: Tensor | Fp8Weight | None = None  # (E, 2Im, D), gate first
    expert_down: Tensor | Fp8Weight | None = None  # (E, D, Im)


@dataclass
class Weights:
    """All of a decoder's weights; `head` is the very tensor `embedding` where the model ties them."""

    embedding: Tensor  # (V, D)
    layers: list[LayerWeights]
    norm: Tensor  # (D,)
    head: Weight  # (V, D)


def load_weights(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device, progress: Progress | None = None,
    sharder: "Sharder | None" = None, quantize: Quantize | None = None, kv_scales: bool = False,
) -> Weights:  # fmt: skip
    """Read a folder's safetensors, one tensor or shard at a time, once all are checked against `spec`.

    Matrices that are stored in FP8 stay so; the others of `QUANTIZED` go through `quantize` as they are read. With
    `kv_scales` those for keys and values are applied. Raises ModelError naming file and tensor.
    """
    checkpoint = Checkpoint(folder)
    plan = [(p, (Source(p.fused, p.shape),) if p.fused in checkpoint else p.sources) for p in parameters(spec)]
    for source in (source for _, sources in plan for source in sources):
        checkpoint.check(source.name, source.shape)
    checkpoint.check_complete({source.name for _, sources in plan for source in sources})
    if spec.tie_embeddings and HEAD in checkpoint and checkpoint.differ(EMBEDDING, HEAD):
        tied = "the config ties the output head to the embedding (tie_word_embeddings)"
        logger.warning("%s: %s, and the other %s in the file is not used", folder, tied, HEAD)
    if kv_scales:
        checkpoint.fold_kv_scales(spec)
    total = held_elements(spec, sharder)
    tensors: dict[tuple[int | None, str], Weight] = {}
    for parameter, sources in plan:
        shard = shard_of(parameter, sharder)
        scale = checkpoint.scales(sources)
        kind = dtype if scale is None else FP8
        tensor = torch.zeros(shard.shape(parameter.shape), dtype=kind, device=device)
        for source in sources:
            for take, region in shard_slices(source, shard):
                checkpoint.read_into(source.name, tensor[region], take)
        weight: Weight = tensor
        if scale is not None:
            weight = Fp8Weight(tensor, scale_shard(scale, parameter.shape, shard, sources[0].name).to(device))
            weight = weight if parameter.field in QUANTIZED else weight.dequantize(dtype)
        elif quantize is not None and parameter.field in QUANTIZED:
            weight = quantize(tensor)
        tensors[parameter.layer, parameter.field] = weight
        if progress is not None:
            progress(tensor.numel(), total)
    return assemble(spec, tensors)


def dummy_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, seed: int = 0, sharder: "Sharder | None" = None,
    quantize: Quantize | None = None,
) -> Weights:  # fmt: skip
    """Seeded noise under which activations stay of order one at any depth; ranks' shards are those of one model.

    Norms are 1. Matrices have standard deviation 1 / sqrt(fan in), those that add to the residual stream a further
    1 / sqrt(2 layers), so that its variance does not grow with depth (as GPT-2 does at initialisation).
    """
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[tuple[int | None, str], Weight] = {}
    for parameter in parameters(spec):
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.field.endswith("norm"):
            tensor.fill_(1.0)
        else:
            std = 0.02 if parameter.field.endswith("bias") else 1.0 / math.sqrt(parameter.shape[-1])
            if parameter.field in ("o", "down", "expert_down"):
                std /= math.sqrt(2 * spec.num_layers)
            tensor.normal_(0.0, std, generator=generator)
        tensor = shard_of(parameter, sharder).of(tensor)
        quantized = quantize is not None and parameter.field in QUANTIZED
        tensors[parameter.layer, parameter.field] = quantize(tensor) if quantize and quantized else tensor
    return assemble(spec, tensors)


def assemble(spec: ModelSpec, tensors: Mapping[tuple[int | None, str], Any]) -> Weights:
    """Weights from tensors by (layer, field), as `parameters` names them; one without elements is left out."""
    layers: list[dict[str, Any]] = [{} for _ in range(spec.num_layers)]
    for (layer, name), tensor in tensors.items():
        if layer is not None and math.prod(tensor.shape):
            layers[layer][name] = tensor
    embedding = tensors[None, "embedding"]
    head = embedding if spec.tie_embeddings else tensors[None, "head"]
    return Weights(embedding, [LayerWeights(**layer) for layer in layers], tensors[None, "norm"], head)


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor and where it goes: into `parameter[expert]`, or `parameter`, from row `start` on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class Parameter:
    """One tensor of ours, by its sources in order."""

    layer: int | None  # None: a field of Weights
    field: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    fused: str = ""  # the checkpoint tensor that may hold all of it instead


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, in the order of the forward pass. Nothing else knows Hugging Face's names."""
    hidden, width, head_dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    found = [_stacked(None, "embedding", {EMBEDDING: spec.vocab_size}, hidden)]
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = {f"{attention}q_proj": q, f"{attention}k_proj": kv, f"{attention}v_proj": kv}
        found.append(_stacked(layer, "input_norm", {f"{prefix}input_layernorm.weight": hidden}))
        found += _linear(layer, "qkv", qkv, hidden, spec.qkv_bias)
        if spec.qk_norm:
            found.append(_stacked(layer, "q_norm", {f"{attention}q_norm.weight": head_dim}))
            found.append(_stacked(layer, "k_norm", {f"{attention}k_norm.weight": head_dim}))
        found += _linear(layer, "o", {f"{attention}o_proj": hidden}, q, spec.o_bias)
        found.append(_stacked(layer, "post_norm", {f"{prefix}post_attention_layernorm.weight": hidden}))
        if spec.moe is not None and spec.moe.layers[layer]:
            found += _expert_parameters(spec.moe, layer, hidden)
        else:
            gate_up = {f"{mlp}gate_proj": width, f"{mlp}up_proj": width}
            found += _linear(layer, "gate_up", gate_up, hidden, spec.mlp_bias)
            found += _linear(layer, "down", {f"{mlp}down_proj": hidden}, width, spec.mlp_bias)
    found.append(_stacked(None, "norm", {"model.norm.weight": hidden}))
    if not spec.tie_embeddings:
        found.append(_stacked(None, "head", {HEAD: spec.vocab_size}, hidden))
    return found


def _linear(layer: int, field: str, modules: Mapping[str, int], columns: int, bias: bool) -> list[Parameter]:
    """The weight, and bias, of modules with so many rows each, concatenated."""
    found = [_stacked(layer, field, {f"{name}.weight": height for name, height in modules.items()}, columns)]
    if bias:
        found.append(_stacked(layer, f"{field}_bias", {f"{name}.bias": height for name, height in modules.items()}))
    return found


def _stacked(layer: int | None, field: str, heights: Mapping[str, int], *columns: int) -> Parameter:
    """A parameter of checkpoint tensors (height, *columns), concatenated."""
    *starts, total = accumulate(heights.values(), initial=0)
    sources = (Source(name, (heights[name], *columns), start) for name, start in zip(heights, starts, strict=True))
    return Parameter(layer, field, (total, *columns), tuple(sources))


def _expert_parameters(moe: Moe, layer: int, hidden: int) -> list[Parameter]:
    width, experts = moe.width, moe.num_experts
    prefix = f"model.layers.{layer}.mlp."
    gate_up, down = [], []
    for i in range(experts):
        gate_up.append(Source(f"{prefix}experts.{i}.gate_proj.weight", (width, hidden), 0, i))
        gate_up.append(Source(f"{prefix}experts.{i}.up_proj.weight", (width, hidden), width, i))
        down.append(Source(f"{prefix}experts.{i}.down_proj.weight", (hidden, width), 0, i))
    gate_up_shape, down_shape = (experts, 2 * width, hidden), (experts, hidden, width)
    return [
        _stacked(layer, "router", {f"{prefix}gate.weight": experts}, hidden),
        Parameter(layer, "expert_gate_up", gate_up_shape, tuple(gate_up), f"{prefix}experts.gate_up_proj"),
        Parameter(layer, "expert_down", down_shape, tuple(down), f"{prefix}experts.down_proj"),
    ]


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a parameter: ranges [start, stop) of one axis, concatenated, then `padding` zeros."""

    axis: int
    ranges: tuple[tuple[int, int], ...]
    padding: int = 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        length = sum(stop - start for start, stop in self.ranges) + self.padding
        return (*whole[: self.axis], length, *whole[self.axis + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """The shard of a whole parameter, itself or a copy."""
        shape = self.shape(tuple(whole.shape))
        if shape == whole.shape:
            return whole
        shard, reached = whole.new_zeros(shape), 0
        for start, stop in self.ranges:
            shard.narrow(self.axis, reached, stop - start).copy_(whole.narrow(self.axis, start, stop - start))
            reached += stop - start
        return shard


Region = tuple[int | slice, ...]
Sharder = Callable[[Parameter], Shard | None]  # None: a rank holds all of the parameter


def shard_of(parameter: Parameter, sharder: Sharder | None) -> Shard:
    shard = None if sharder is None else sharder(parameter)
    return shard or Shard(len(parameter.shape) - 1, ((0, parameter.shape[-1]),))


def held_elements(spec: ModelSpec, sharder: Sharder | None, fields: Sequence[str] | None = None) -> int:
    """How many elements a rank holds of all parameters, or of those of some fields."""
    kept = [parameter for parameter in parameters(spec) if fields is None or parameter.field in fields]
    return sum(math.prod(shard_of(parameter, sharder).shape(parameter.shape)) for parameter in kept)


def scale_shard(scale: Tensor, shape: tuple[int, ...], shard: Shard, name: str) -> Tensor:
    """`Fp8Weight.scale` of a shard, from that of the whole parameter of this shape."""
    if scale.shape[-2] == shape[-2]:
        return scale if shard.axis == len(shape) - 1 else shard.of(scale)
    for start, stop in shard.ranges:
        if start % BLOCK or (stop % BLOCK and stop <= (scale.shape[shard.axis] - 1) * BLOCK):
            raise ModelError(f"tensor {name}: a part from {start} to {stop} splits a block of {BLOCK}; use fewer ranks")
    return Shard(shard.axis, tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in shard.ranges)).of(scale)


def shard_slices(source: Source, shard: Shard) -> list[tuple[Region, Region]]:
    """Parts of a source that a rank reads, each with the region of the shard that it fills."""
    expert: tuple[int, ...] = () if source.expert is None else (source.expert,)
    axis = shard.axis - len(expert)
    first = source.start if axis == 0 else 0  # where the source begins on the axis that is split
    found: list[tuple[Region, Region]] = []
    reached = 0
    for start, stop in shard.ranges:
        low, high = max(start, first), min(stop, first + source.shape[axis])
        if low < high:
            take = [slice(0, size) for size in source.shape]
            region = [slice(source.start, source.start + source.shape[0]), *take[1:]]
            take[axis] = slice(low - first, high - first)
            region[axis] = slice(reached + low - start, reached + high - start)
            found.append((tuple(take), (*expert, *region)))
        reached += stop - start
    return found


class Checkpoint:
    """The tensors of a model folder, mapped while this is there. Raises ModelError naming file and tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, tuple[Path, Any]] = {}  # by tensor: its file, and a slice of safetensors
        self._factors: dict[str, float] = {}  # by tensor: what it is multiplied by
        promised = self._read_index(folder / INDEX) if (folder / INDEX).exists() else {}
        for path in dict.fromkeys(promised.values()) or self._safetensors():
            self._map(path, promised)
        for name, path in promised.items():
            if name not in self:
                raise ModelError(f"{path}: tensor {name} is missing, the index promises it")

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self._find(name)
        if (found := tuple(stored.get_shape())) != shape:
            raise self._error(name, f"has shape {found}, the config asks for {shape}")
        dtype = stored.get_dtype()
        if dtype == STORED_FP8 and self._scale_name(name) is None:
            scale = name.rpartition(".")[2] + SCALES[1]
            raise self._error(name, f"is stored as {dtype}, and there is no {scale} beside it")
        if dtype not in (*STORED_DTYPES, STORED_FP8):
            raise self._error(name, f"is stored as {dtype}; {', '.join(STORED_DTYPES)} can be read")

    def check_complete(self, used: set[str]) -> None:
        """Refuse a weight or bias of a known module that is not in `used`: it would change the output."""
        modules = {name.rpartition(".")[0] for name in used}
        for name in self._stored:
            module, _, kind = name.rpartition(".")
            if kind in ("weight", "bias") and module in modules and name not in used:
                raise self._error(name, "has no place in the model the config describes")

    def differ(self, name: str, other: str) -> bool:
        """Whether two matrices are not the same, as far as some of their rows tell."""
        first, second = self._find(name), self._find(other)
        if (shape := first.get_shape()) != second.get_shape():
            return True
        rows = range(0, shape[0], -(-shape[0] // 64))
        return any(not torch.equal(first[row].float(), second[row].float()) for row in rows)

    def scales(self, sources: Sequence[Source]) -> Tensor | None:
        """`Fp8Weight.scale` of a parameter in FP8; None where it is in none."""
        stored = [self._find(source.name).get_dtype() == STORED_FP8 for source in sources]
        if not any(stored):
            return None
        if not all(stored):
            names = f"{sources[stored.index(True)].name} is in FP8, {sources[stored.index(False)].name} is not"
            raise ModelError(f"{self.folder}: {names}, and they are one tensor here")
        scales = [self._scale(source) for source in sources]
        in_rows = [scale.shape[-2] == source.shape[-2] for scale, source in zip(scales, sources, strict=True)]
        odd = [a.name for a, b in pairwise(sources) if a.expert == b.expert and a.shape[0] % BLOCK]
        if any(in_rows) and not all(in_rows):
            raise ModelError(f"{self.folder}: {sources[0].name} and those beside it are scaled in different ways")
        if odd and not all(in_rows):
            raise self._error(odd[0], f"has rows that are no multiple of {BLOCK}, the side of a block")
        joined, last = torch.cat(scales), sources[-1].expert
        return joined if last is None else joined.view(last + 1, -1, joined.shape[-1])

    def _scale(self, source: Source) -> Tensor:
        name = self._scale_name(source.name)
        assert name is not None
        scale = self._positive(name) * self._factors.get(source.name, 1.0)
        *experts, rows, columns = source.shape
        channels, blocks = (*experts, rows, 1), (*experts, -(-rows // BLOCK), -(-columns // BLOCK))
        if scale.numel() == 1:
            return scale.reshape(()).expand(channels)
        if scale.shape in (channels[:-1], channels):
            return scale.reshape(channels)
        if scale.shape == blocks:
            return scale
        rule = f"a weight of {source.shape} has one, {rows} for the rows or {blocks} for blocks of {BLOCK} x {BLOCK}"
        raise self._error(name, f"has shape {tuple(scale.shape)}; {rule}")

    def _scale_name(self, name: str) -> str | None:
        return next((name + scale for scale in SCALES if name + scale in self), None)

    def _positive(self, name: str) -> Tensor:
        found: Tensor = self._find(name)[()].float()
        if not (found.isfinite() & (found > 0)).all():
            raise self._error(name, "has a scale that is not positive and finite")
        return found

    def fold_kv_scales(self, spec: ModelSpec) -> None:
        """Have weights before the cache divided by the scales of keys and values, and those after it multiplied.

        A scale is rounded up to a power of two, by which weights are multiplied without rounding, very small ones in
        float16 aside. FP8 is a floating format and loses nothing by that.
        """
        for layer in range(spec.num_layers):
            module = f"model.layers.{layer}.self_attn."
            k, v = self._kv_factor(module, "k"), self._kv_factor(module, "v")
            key, query = ("k_norm", "q_norm") if spec.qk_norm else ("k_proj", "q_proj")
            for name, factor in ((key, 1 / k), (query, k), ("v_proj", 1 / v), ("o_proj", v)):
                self._factors[f"{module}{name}.weight"] = factor
                if name != "o_proj":  # whose bias does not read the cache
                    self._factors[f"{module}{name}.bias"] = factor

    def _kv_factor(self, module: str, kind: str) -> float:
        name = next((name for each in KV_SCALES if (name := module + each.format(kind)) in self), None)
        if name is None:
            return 1.0
        scale = self._positive(name)
        if scale.numel() != 1:
            raise self._error(name, f"has shape {tuple(scale.shape)}; a layer has one scale")
        return float(2.0 ** math.ceil(math.log2(scale.item())))

    def read_into(self, name: str, destination: Tensor, take: Region) -> None:
        """Copy a part of a tensor into `destination`, converting dtype and device; nothing else of it is read."""
        try:
            with NO_PANICS:
                destination.copy_(self._find(name)[take])
        except (SafetensorError, NativePanicError) as error:
            raise self._error(name, f"cannot be read: {error}") from error
        if name in self._factors and destination.dtype != FP8:
            destination *= self._factors[name]

    def _error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self._stored[name][0]}: tensor {name} {problem}")

    def _find(self, name: str) -> Any:
        if name not in self:
            raise ModelError(f"{self.folder}: tensor {name} is missing")
        return self._stored[name][1]

    def _read_index(self, index: Path) -> dict[str, Path]:
        files = Fields(read_json(index), str(index)).section("weight_map").values
        for name, file in files.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(f"{index}: tensor {name}: {file!r} is not the name of a safetensors file beside it")
        return {name: self.folder / file for name, file in files.items()}

    def _safetensors(self) -> list[Path]:
        """The files of a folder without an index."""
        if not self.folder.is_dir():
            raise ModelError(f"{self.folder}: no such folder")
        single = self.folder / "model.safetensors"
        if paths := [single] if single.exists() else sorted(self.folder.glob("*.safetensors")):
            return paths
        if pickles := sorted(path.name for path in self.folder.iterdir() if path.suffix in PICKLES):
            rule = "is a pickle, which can run any code and is never read; use safetensors"
            raise ModelError(f"{self.folder}: {pickles[0]} {rule}")
        raise ModelError(f"{self.folder}: no *.safetensors file")

    def _map(self, path: Path, promised: Mapping[str, Path]) -> None:
        """Take in a file's tensors, with an index those that it promises from there."""
        require_file(path)
        try:
            with NO_PANICS:
                file: Any = safe_open(path, framework="pt", device="cpu")
                names = file.keys()
                slices = {name: file.get_slice(name) for name in names}
        except (SafetensorError, NativePanicError) as error:
            raise ModelError(f"{path}: not a complete safetensors file: {error}") from error
        except OSError as error:
            raise ModelError(f"{path}: {error.strerror or error}") from error
        for name, stored in slices.items():
            if promised and promised.get(name) != path:
                continue
            if name in self:
                raise ModelError(f"{path}: tensor {name} is also in {self._stored[name][0].name}")
            self._stored[name] = path, stored
