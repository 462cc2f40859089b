import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.driver import CPU, Driver
from helpers.models import tiny_spec
from helpers.tiny_models import ARCHITECTURES, SIZES, random_model
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.weights import Weights, dummy_weights, load_weights
from minisgl.errors import ModelError

CASES: dict[str, tuple[str, dict[str, Any]]] = {"plain": ("Llama", {}), **ARCHITECTURES}


def save(folder: Path, case: str = "plain", **options: Any) -> Any:
    """A random model of transformers, saved."""
    kind, extra = CASES[case]
    model = random_model(kind, **{**SIZES, "num_hidden_layers": 3, **extra})
    model.save_pretrained(folder, **options)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(folder, read_spec(folder), dtype, CPU)


OURS = {
    "input_norm": ["input_layernorm.weight"], "post_norm": ["post_attention_layernorm.weight"],
    "qkv": [f"self_attn.{x}_proj.weight" for x in "qkv"], "qkv_bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "q_norm": ["self_attn.q_norm.weight"], "k_norm": ["self_attn.k_norm.weight"],
    "o": ["self_attn.o_proj.weight"], "o_bias": ["self_attn.o_proj.bias"],
    "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"], "down": ["mlp.down_proj.weight"],
    "gate_up_bias": ["mlp.gate_proj.bias", "mlp.up_proj.bias"], "down_bias": ["mlp.down_proj.bias"],
    "router": ["mlp.gate.weight"], "expert_gate_up": ["mlp.experts.gate_up_proj"],
    "expert_down": ["mlp.experts.down_proj"],
}  # fmt: skip


def assert_same(weights: Weights, model: Any, spec: ModelSpec) -> None:
    """Every weight of ours is the transformers module's, concatenated where we keep several in one."""
    assert (weights.head is weights.embedding) == spec.tie_embeddings
    theirs = {**dict(model.named_parameters()), "lm_head.weight": model.lm_head.weight}
    pairs = [(weights.embedding, ["model.embed_tokens.weight"]), (weights.norm, ["model.norm.weight"])]
    assert isinstance(weights.head, Tensor)
    pairs.append((weights.head, ["lm_head.weight"]))
    for index, layer in enumerate(weights.layers):
        pairs += [(vars(layer)[field], [f"model.layers.{index}.{x}" for x in OURS[field]]) for field in vars(layer)]
    for ours, names in pairs:
        assert [name in theirs for name in names] == [ours is not None] * len(names)
        if ours is not None:
            assert torch.equal(ours, torch.cat([theirs.pop(name) for name in names]).to(ours.dtype))
    assert not theirs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_architecture_loads_what_transformers_saved(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Converted to the dtype asked for, from one file or, for experts in half precision, from many with an index.

    Experts may also be stored as one tensor for all.
    """
    sharded = case == "qwen3-moe" and dtype != torch.float32
    model = save(tmp_path, case, **({"max_shard_size": "30KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded
    weights = load(tmp_path, dtype)
    qkv = weights.layers[2].qkv
    assert isinstance(qkv, Tensor)
    assert qkv.dtype == dtype
    assert_same(weights, model, read_spec(tmp_path))
    if case == "qwen3-moe" and not sharded:
        model = save(tmp_path, case, save_original_format=False)
        assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
        assert_same(load(tmp_path), model, read_spec(tmp_path))


NORM, BIAS = "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "missing"]),
        (lambda t: t.update({NORM: torch.ones(31)}), [NORM, "(31,)", "(64,)", "model.safetensors"]),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), [NORM, "I8"]),
        (lambda t: t.update({BIAS: torch.ones(64)}), [BIAS, "no place"]),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: list[str]
) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    assert all(word in caught.value.message for word in words)


def header(content: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", claimed or len(content)) + content


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:20],
        lambda raw: b"",
        lambda raw: header(b"{}", 2**63),
        lambda raw: header(b"{not json"),
        lambda raw: header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,9999999]}}'),
        lambda raw: header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}'),
        lambda raw: header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}') + bytes(16),
    ],
)
def test_truncated_and_hostile_files_are_refused_by_name(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *((NORM, file) for file in ("../x.safetensors", "/etc/x.safetensors", "x.bin", "sub/x.safetensors", 3)),
        (NORM, "gone.safetensors"),
        ("x", "model.safetensors"),
    ],
)
def test_an_index_may_only_name_tensors_of_safetensors_beside_it(tmp_path: Path, name: str, file: Any) -> None:
    folder = tmp_path / "model"
    save(folder)
    save_file({NORM: torch.ones(32)}, tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file}}))
    with pytest.raises(ModelError, match="tensor x is missing" if name == "x" else r"index\.json|gone"):
        load(folder)


def test_of_a_folder_with_an_index_only_what_it_names_is_read(tmp_path: Path) -> None:
    model = save(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    places = dict.fromkeys(tensors, path.name) | {NORM: "norm.safetensors"}
    save_file({NORM: tensors[NORM]}, tmp_path / "norm.safetensors")
    save_file(tensors | {NORM: tensors[NORM] + 1, BIAS: torch.ones(64)}, path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(load(tmp_path), model, read_spec(tmp_path))


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3-moe"])
def test_dummy_weights_have_the_checkpoints_shapes_and_a_seed(tmp_path: Path, case: str) -> None:
    save(tmp_path, case)
    spec = read_spec(tmp_path)
    real, (first, again, other) = load(tmp_path), (dummy_weights(spec, torch.float32, CPU, seed=s) for s in (1, 1, 2))
    heads: list[Any] = [weights.head for weights in (first, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    for ours, theirs in zip(first.layers, real.layers, strict=True):
        shapes = [{k: v.shape for k, v in vars(layer).items() if v is not None} for layer in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert bool((ours.input_norm == 1).all())


def test_dummy_weights_have_the_scale_that_keeps_activations_of_order_one(tmp_path: Path) -> None:
    """1 / sqrt(fan in), and what adds to the residual stream a further 1 / sqrt(2 layers)."""
    save(tmp_path, "qwen3-moe")
    spec = dataclasses.replace(read_spec(tmp_path), hidden_size=256, intermediate_size=512, qkv_bias=True)
    assert spec.moe is not None
    weights = dummy_weights(spec, torch.float32, CPU)
    expected = {"qkv": 256, "gate_up": 256, "router": 256, "expert_gate_up": 256}
    residual = {"o": 64, "down": 512, "expert_down": spec.moe.width}
    for layer in weights.layers:
        for name, value in vars(layer).items():
            if value is not None and not name.endswith("norm"):
                std = expected[name] ** -0.5 if name in expected else 0.02
                std = (residual[name] * 2 * spec.num_layers) ** -0.5 if name in residual else std
                assert float(value.std()) == pytest.approx(std, rel=0.1 if value.dim() > 1 else 0.3), name
    assert float(weights.embedding.std()) == pytest.approx(256**-0.5, rel=0.05)


def test_dummy_activations_stay_finite_in_half_precision_at_depth() -> None:
    spec = tiny_spec(num_layers=64, windows=(0,) * 64, hidden_size=128, head_dim=32, intermediate_size=256)
    driver = Driver(spec, dummy_weights(spec, torch.float16, CPU), dtype=torch.float16)
    after, stream = driver.decoder.after_attention, []

    def record(*args: Any) -> tuple[Any, Tensor]:
        x, residual = after(*args)
        stream.append(float(residual.float().std()))
        return x, residual

    with mock.patch.object(driver.decoder, "after_attention", record):
        driver.step(chunks={0: list(range(32))})
    assert len(stream) == 64
    assert all(0.1 < std < 10 for std in stream)
