"""Converting a GGUF file into a model folder in Hugging Face's layout, once, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisgl.config import cache_folder
from minisgl.errors import ModelError
from minisgl.models.checkpoint import INDEX
from minisgl.models.gguf_config import hf_config
from minisgl.models.gguf_file import GgufFile
from minisgl.models.gguf_tokenizer import GgufTokenizer
from minisgl.models.parameters import Source, parameters
from minisgl.models.progress import progress_bar
from minisgl.models.spec import ModelSpec, read_spec

CONVERSION = 1
"""Part of the cache key; raised whenever the conversion gives something else than before."""

SHARD_ELEMENTS = 2**29
PERMUTED = ("llama", "mistral")
"""GGUF architectures whose q and k rows are interleaved for llama.cpp's rotary embedding."""

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
"""Module of Hugging Face's layout (within its layer, or within its expert) -> GGUF's name for it."""


def convert_gguf(path: Path, dtype: str, *, weights: bool = True, progress: bool = False) -> Path:
    """The folder that holds this GGUF file in Hugging Face's layout, its tensors stored as `dtype`.

    Made on the first call and found in the cache folder afterwards; a changed file is converted anew. The folder
    appears whole or not at all, also where two processes convert at once. Without `weights` it holds no tensors.
    Raises ModelError naming the file, and the tensor where there is one.
    """
    try:
        path = path.resolve(strict=True)
        facts = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    key = json.dumps([str(path), facts.st_size, facts.st_mtime_ns, dtype, weights, CONVERSION])
    folder = Path(cache_folder()) / "gguf" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent, ignore_cleanup_errors=True) as work:
            written = Path(work) / "model"
            written.mkdir()
            _write(GgufFile(path), written, dtype, weights=weights, progress=progress)
            _publish(written, folder)
    except OSError as error:
        raise ModelError(f"{path}: cannot be converted into {folder}: {error.strerror or error}") from error
    return folder


def _publish(written: Path, folder: Path) -> None:
    try:
        os.rename(written, folder)
    except OSError:
        # Another process was quicker; its folder holds the same.
        if not folder.is_dir():
            raise
        shutil.rmtree(written)


def _write(file: GgufFile, folder: Path, dtype: str, *, weights: bool, progress: bool) -> None:
    tokenizer = GgufTokenizer(file)
    config = hf_config(file, dtype)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_token_ids()})
    _write_json(folder / "tokenizer_config.json", tokenizer.config())
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    spec = read_spec(folder)
    sources = [source for parameter in parameters(spec) for source in parameter.sources]
    _check_tensors(file, sources)
    if weights:
        _write_tensors(file, folder, spec, sources, dtype, progress=progress)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def gguf_name(name: str) -> str:
    """GGUF's name of the tensor that holds Hugging Face's `name`, for an expert all experts' together."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    if parts[:2] != ["model", "layers"]:
        return f"{TENSORS[module]}.{kind}"
    within = parts[6:] if parts[3:5] == ["mlp", "experts"] else parts[3:]
    return f"blk.{parts[2]}.{TENSORS['.'.join(within)]}.{kind}"


def _check_tensors(file: GgufFile, sources: list[Source]) -> None:
    used = {"rope_freqs.weight"}
    for source in sources:
        name = gguf_name(source.name)
        used.add(name)
        if name not in file.tensors:
            raise file.error(f"tensor {name} is missing")
        shape = file.tensors[name].shape[0 if source.expert is None else 1 :]
        if shape != source.shape:
            raise file.error(f"tensor {name} has shape {shape}, the metadata asks for {source.shape}")
    for name in file.tensors:
        if name not in used and not name.endswith(".attn_rot_embd.weight"):
            raise file.error(f"tensor {name} has no place in the model the metadata describes")


def _write_tensors(
    file: GgufFile, folder: Path, spec: ModelSpec, sources: list[Source], dtype: str, *, progress: bool
) -> None:
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(gguf_name(source.name), []).append(source)
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    elements = number = 0
    permuted = file.metadata["general.architecture"] in PERMUTED
    total = sum(file.tensors[name].size for name in groups)
    with progress_bar(f"Converting {file.path.name}", total, enabled=progress) as advance:
        for name, members in groups.items():
            whole = torch.from_numpy(file.floats(name)).to(getattr(torch, dtype))
            for source in members:
                tensor = whole if source.expert is None else whole[source.expert]
                shard[source.name] = unpermute(tensor, source.name, spec) if permuted else tensor
            advance(file.tensors[name].size)
            elements += whole.numel()
            if elements >= SHARD_ELEMENTS:
                places |= _write_shard(folder, number, shard)
                shard, elements, number = {}, 0, number + 1
    places |= _write_shard(folder, number, shard)
    _write_json(folder / INDEX, {"metadata": {}, "weight_map": places})


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> dict[str, str]:
    name = f"model-{number + 1:05d}.safetensors"
    if shard:
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, folder / name, {"format": "pt"})
    return dict.fromkeys(shard, name)


def unpermute(tensor: Tensor, name: str, spec: ModelSpec) -> Tensor:
    """Undo llama.cpp's order of q and k rows, (head, pair, half) there and (head, half, pair) here; others as is."""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    pairs = tensor.view(heads, spec.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
