import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.gguf_files import MODELS, SIZES, tokenizer_metadata, write_gguf, write_model
from minisgl.build import read_eos_token_ids
from minisgl.core.model_config import Fields, read_rope, read_spec
from minisgl.core.weights import load_weights
from minisgl.errors import ModelError
from minisgl.formats.cache import convert_gguf
from minisgl.formats.gguf import BLOCK_FORMATS, GgufFile


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(torch.tensor([[1, 5, 9, 300, 17, 42]])).logits


@pytest.mark.parametrize(
    ("kind", "format", "options"),
    [
        *((kind, "F32", {}) for kind in MODELS),
        ("llama", "F32", {"attention_bias": True, "mlp_bias": True}),
        *(("llama", format, {}) for format in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    ],
)
def test_a_converted_model_computes_what_the_original_does(
    tmp_path: Path, kind: str, format: str, options: dict[str, Any]
) -> None:
    model = write_model(tmp_path / "model.gguf", kind, format, **options)
    folder = convert_gguf(tmp_path / "model.gguf", "float32")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    spec = read_spec(folder)
    assert spec.architecture == type(model).__name__
    assert spec.tie_embeddings == model.config.tie_word_embeddings
    assert set(read_eos_token_ids(folder, spec.vocab_size)) == {1, 3}
    load_weights(folder, spec, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_every_format_is_read_as_the_gguf_package_reads_it(tmp_path: Path, format: str) -> None:
    kind = gguf.GGMLQuantizationType[format]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x3c make every half-precision scale among them finite.
    raw = np.random.default_rng(0).integers(0, 0x3C, (3, 512 // block * size), dtype=np.uint8)
    path = write_gguf(tmp_path / "x.gguf", "llama", {"x": raw}, {"x": kind})
    file = GgufFile(path)
    assert file.tensors["x"].shape == (3, 512)
    assert np.array_equal(file.floats("x"), gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, kind))
    assert file.metadata["general.architecture"] == "llama"


def test_metadata_of_every_type_is_read_as_written(tmp_path: Path) -> None:
    metadata = {"a": 3, "b": 0.5, "c": "text ü", "d": True, "e": [1, 2], "f": ["x", ""], "g": [0.25, 4.0], "h": -1e-5}
    path = write_gguf(tmp_path / "x.gguf", "llama", {**metadata, "x": np.ones(4, np.float32)})
    assert {key: GgufFile(path).metadata[key] for key in metadata} == metadata


def convert(tmp_path: Path, changes: dict[str, Any]) -> Path:
    write_model(tmp_path / "model.gguf", "llama", changes=changes)
    return convert_gguf(tmp_path / "model.gguf", "float32")


LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
SCALING, ADD_BOS = "llama.rope.scaling", "tokenizer.ggml.add_bos_token"
LINEAR = {f"{SCALING}.type": "linear", f"{SCALING}.factor": 2.0}
YARN = {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0, f"{SCALING}.yarn_beta_fast": 16.0}
YARN[f"{SCALING}.original_context_length"] = 64


def llama3_divisors(factor: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What llama.cpp's converter writes for head size 16, base 5e5 and Llama 3's constants, after its own loop."""
    divisors = []
    for pair in range(8):
        wavelength = 2 * np.pi * 5e5 ** (2 * pair / 16)
        smooth = (8192 / wavelength - 1.0) / 3.0
        between = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4.0 else factor if wavelength > 8192 / 1.0 else between)
    return np.array(divisors, np.float32)


THETA = {"llama.rope.freq_base": 5e5}


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        (THETA, {"rope_theta": 5e5}),
        (LINEAR, {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}),
        ({**THETA, "rope_freqs.weight": llama3_divisors(32.0)}, {"rope_theta": 5e5, **LLAMA3, "factor": 32.0}),
    ],
    ids=["default", "linear", "scale_linear", "yarn", "llama3"],
)
def test_rope_scaling_is_read_from_metadata_and_the_tensor(
    tmp_path: Path, changes: dict[str, Any], parameters: dict[str, Any]
) -> None:
    config = Fields({"rope_parameters": {"rope_theta": 1e4, **parameters}}, "")
    rope = read_spec(convert(tmp_path, changes)).rope
    assert rope == read_rope(config, SIZES["head_dim"], SIZES["max_position_embeddings"])
    if "rope_freqs.weight" in changes:
        assert np.allclose(rope.divisors, changes["rope_freqs.weight"])


def test_a_window_makes_the_llama_architecture_a_mistral_also_without_weights(tmp_path: Path) -> None:
    write_model(path := tmp_path / "model.gguf", "llama", changes={"llama.attention.sliding_window": 32})
    for weights in (False, True):
        folder = convert_gguf(path, "float32", weights=weights)
        spec = read_spec(folder)
        assert (spec.architecture, spec.windows) == ("MistralForCausalLM", (32,) * SIZES["num_hidden_layers"])
        assert bool([*folder.glob("*.safetensors")]) == weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.block_count": None}, ["llama.block_count", "missing"]),
        ({"llama.block_count": 3}, ["blk.2.attn_norm.weight", "missing"]),
        ({"llama.embedding_length": "64"}, ["llama.embedding_length", "integer"]),
        ({"llama.expert_count": 8}, ["experts"]),
        ({"llama.rope.dimension_count": 8}, ["llama.rope.dimension_count", "16"]),
        ({"llama.rope.scaling.type": "longrope"}, ["longrope", "yarn"]),
        ({**YARN, "llama.rope.scaling.yarn_log_multiplier": 0.5}, ["yarn_log_multiplier"]),
        ({"rope_freqs.weight": np.full(8, 3.0, np.float32)}, ["rope_freqs.weight", "Llama 3"]),
        ({"rope_freqs.weight": np.ones(5, np.float32)}, ["rope_freqs.weight", "shape"]),
        ({"output_norm.weight": np.ones(63, np.float32)}, ["output_norm.weight", "(63,)", "(64,)"]),
        ({"output_norm.weight": None}, ["output_norm.weight", "missing"]),
        ({"blk.0.ffn_sub_norm.weight": np.ones(8, np.float32)}, ["blk.0.ffn_sub_norm.weight", "no place"]),
        ({"tokenizer.ggml.pre": "falcon"}, ["tokenizer.ggml.pre", "falcon", "smollm"]),
        ({"tokenizer.ggml.pre": None}, ["tokenizer.ggml.pre", "missing"]),
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model", "bert"]),
        ({"tokenizer.ggml.merges": ["a b c"]}, ["tokenizer.ggml.merges", "pairs"]),
        ({"tokenizer.ggml.merges": ["zz yy"]}, ["tokenizer.ggml.merges", "vocabulary"]),
        ({"tokenizer.ggml.eos_token_id": 10**6}, ["tokenizer.ggml.eos_token_id", "below"]),
        ({"tokenizer.ggml.token_type": [1]}, ["tokenizer.ggml.token_type"]),
        ({ADD_BOS: True, "tokenizer.ggml.bos_token_id": None}, [ADD_BOS, "bos_token_id is missing"]),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, ["tokenizer.ggml.tokens", "twice"]),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        convert(tmp_path, changes)
    assert all(word in caught.value.message for word in ["model.gguf", *words])


def test_an_unknown_architecture_is_refused_with_the_list_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "gemma", {**tokenizer_metadata(), "x": np.ones(4, np.float32)})
    words = r"model\.gguf.*gemma is not supported.*llama, mistral, qwen2, qwen3, qwen3moe"
    with pytest.raises(ModelError, match=words):
        convert_gguf(path, "float32")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


HUGE = 2**62


def start(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def entry(name: bytes, kind: int, count: int | None = None, items: int = 0) -> bytes:
    """A key of metadata whose value is a zero of a type, or an array of `count` items of a type."""
    value = struct.pack("<II", kind, 0) if count is None else struct.pack("<IIQ", kind, items, count)
    return struct.pack("<Q", len(name)) + name + value


def tensor(shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<QcI{len(shape)}QIQ", 1, b"t", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", ["cannot be read"]),
        (b"GG", ["truncated in the header"]),
        (b"PK\x03\x04" + bytes(64), ["not a GGUF file"]),
        (start(0, 0, version=1), ["version 1"]),
        (start(0, 0, version=3 << 24), ["byte order"]),
        *((start(*counts), ["truncated"]) for counts in ((0, HUGE), (HUGE, 0))),
        (start(0, 1) + struct.pack("<Q", HUGE), ["truncated"]),
        *((start(0, 1) + entry(b"k", 9, HUGE, items), ["truncated in metadata k"]) for items in (4, 8)),
        (start(0, 1) + entry(b"k", 9, 1, 9), ["metadata k", "type 9"]),
        (start(0, 1) + entry(b"k", 77), ["metadata k", "type 77"]),
        (start(0, 1) + entry(b"\xff\xfe", 4), ["not UTF-8"]),
        (start(0, 2) + 2 * entry(b"k", 4), ["metadata k appears twice"]),
        (start(0, 1) + entry(b"general.alignment", 4), ["general.alignment 0"]),
        (start(1, 0) + tensor([4], offset=HUGE), ["tensor t", "outside"]),
        *((start(1, 0) + tensor(shape), ["tensor t", "outside"]) for shape in ([HUGE, HUGE], [0])),
        (start(1, 0) + tensor([4] * 9), ["tensor t", "9 dimensions"]),
        (start(1, 0) + tensor([4], 999), ["tensor t", "type 999", "Q4_K"]),
        (start(1, 0) + tensor([256], 16), ["tensor t", "IQ2_XXS", "Q4_K"]),
        (start(1, 0) + tensor([4], 2), ["tensor t", "Q4_0 blocks of 32"]),
        (start(2, 0) + 2 * tensor([4]) + bytes(64), ["tensor t appears twice"]),
    ],
)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, raw: bytes, words: list[str]) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        GgufFile(path)
    assert all(word in caught.value.message for word in ["hostile.gguf", *words])


def test_no_flipped_byte_of_the_tables_escapes_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {"a": 1, "b": "text", "c": ["x", "y"], "d": [1, 2]}
    raw = write_gguf(path, "llama", {**metadata, "t": np.ones((2, 4), np.float32)}).read_bytes()
    refused = 0
    for at in range(len(raw) - 32):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        try:
            GgufFile(path)
        except ModelError:
            refused += 1
    assert refused > 50


def test_a_file_or_folder_that_is_not_there_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model.gguf", "llama")
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "model.gguf"))  # no folder
    for name, words in (("model.gguf", "cannot be converted into"), ("none.gguf", "No such file")):
        with pytest.raises(ModelError, match=words):
            convert_gguf(tmp_path / name, "float32")


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model.gguf", "qwen3moe")
    monkeypatch.setattr("minisgl.formats.gguf.SHARD_ELEMENTS", 20_000)
    steps: list[tuple[int, int]] = []
    folder = convert_gguf(tmp_path / "model.gguf", "float32", progress=lambda done, total: steps.append((done, total)))
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == sorted({*places.values()})
    assert names == [f"model-{number:05d}.safetensors" for number in range(1, len(names) + 1)]
    assert 3 <= len(names) <= sum(tensor.numel() for tensor in model.state_dict().values()) // 20_000 + 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert {total for _, total in steps} == {sum(done for done, _ in steps)}
