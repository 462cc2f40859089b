"""Checkpoints in FP8 as Qwen and compressed-tensors write them, `--quantization fp8`, and the twin of the kernels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.driver import CPU
from helpers.tiny_models import SIZES, random_model
from minisgl.core.model_config import read_spec
from minisgl.core.ops import linear
from minisgl.core.quantization import BLOCK, FP8, FP8_MAX, Fp8Weight, quantize, quantize_fp8
from minisgl.core.weights import QUANTIZED, Weights, load_weights
from minisgl.distributed.shard import local_spec, sharder
from minisgl.errors import ModelError

CONFIG = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "head_dim": 64}
GROUP = {"weights": {"type": "float", "num_bits": 8}, "input_activations": {"type": "float", "num_bits": 8}}


def scheme(form: str) -> dict[str, Any]:
    if form == "block":
        return {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    if form == "static":
        return {"quant_method": "fp8", "activation_scheme": "static"}
    group = {**GROUP, "weights": {**GROUP["weights"], "strategy": form}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def quantized(weight: Tensor, form: str) -> tuple[Tensor, Tensor, str]:
    """A weight in FP8, its scale as checkpoints have it, and the scale's name."""
    if form == "block":
        rows, columns = weight.shape
        blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
        return (blocks / scale[:, None, :, None]).reshape(rows, columns).to(FP8), scale, "weight_scale_inv"
    scale = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scale = scale if form == "channel" else scale.max().reshape(1)
    return (weight / scale).to(FP8), scale, "weight_scale"


def save_fp8(folder: Path, form: str, kept: tuple[str, ...] = ()) -> None:
    """A random Qwen3 in this form of FP8; modules whose names hold a word of `kept` stay as they are."""
    random_model("Qwen3", **CONFIG).save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if "proj" in name and not any(word in name for word in kept):
            data, scale, suffix = quantized(tensor, form)
            tensors[name] = data
            tensors[name.replace("weight", suffix)] = scale
            if form == "static":
                tensors[name.replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=scheme(form))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(folder: Path, rank: int = 0, size: int = 1, fp8: bool = False) -> Weights:
    spec = read_spec(folder)
    return load_weights(
        folder,
        spec,
        torch.float32,
        CPU,
        sharder=sharder(spec, rank, size) if size > 1 else None,
        quantize=quantize_fp8 if fp8 else None,
    )


def whole(weight: Any) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, Fp8Weight) else weight


@pytest.mark.parametrize("form", ["block", "channel", "tensor", "static"])
def test_each_form_is_read_and_is_what_was_saved(tmp_path: Path, form: str) -> None:
    save_fp8(tmp_path, form)
    spec = read_spec(tmp_path)
    assert spec.fp8
    stored = load_file(tmp_path / "model.safetensors")
    for index, layer in enumerate(load(tmp_path).layers):
        assert all(isinstance(getattr(layer, name), Fp8Weight) for name in QUANTIZED)
        for name, parts in {"qkv": "q k v", "o": "o", "gate_up": "gate up", "down": "down"}.items():
            expected = []
            for part in parts.split():
                module = f"model.layers.{index}.{'mlp' if name in ('gate_up', 'down') else 'self_attn'}.{part}_proj"
                scale = stored[f"{module}.weight_scale_inv" if form == "block" else f"{module}.weight_scale"]
                spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) if form == "block" else scale
                expected.append(stored[f"{module}.weight"].float() * spread)
            assert torch.equal(whole(getattr(layer, name)), torch.cat(expected))


def test_what_a_checkpoint_leaves_in_full_precision_stays_so(tmp_path: Path) -> None:
    save_fp8(tmp_path, "channel", kept=("layers.0.self_attn.", "down"))
    first, second = load(tmp_path).layers
    assert [isinstance(getattr(first, name), Fp8Weight) for name in QUANTIZED] == [False, False, True, False]
    assert [isinstance(getattr(second, name), Fp8Weight) for name in QUANTIZED] == [True, True, True, False]
    save_fp8(tmp_path, "channel", kept=("k_proj",))
    with pytest.raises(ModelError, match=r"q_proj.weight, .*k_proj.* only some of them are in FP8"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["block", "channel", "tensor", "online"])
def test_shards_are_those_of_the_whole(tmp_path: Path, form: str) -> None:
    online = form == "online"
    save_fp8(tmp_path, "channel" if online else form, kept=("proj",) if online else ())
    if online:
        change_config(tmp_path, quantization_config=None)
    spec = read_spec(tmp_path)
    together, ranks = load(tmp_path, fp8=online), [load(tmp_path, rank, 2, online) for rank in range(2)]
    assert local_spec(spec, 2).num_heads == 2
    for index, layer in enumerate(together.layers):
        for name, axis in (("o", 1), ("down", 1)):
            parts = [whole(getattr(rank.layers[index], name)) for rank in ranks]
            joined, expected = torch.cat(parts, axis), whole(getattr(layer, name))
            if online:  # a rank's scale is of its own columns
                torch.testing.assert_close(joined, expected, atol=0.04, rtol=0.0)
            else:
                assert torch.equal(joined, expected)
        gate_up = [whole(rank.layers[index].gate_up).chunk(2) for rank in ranks]
        assert torch.equal(
            torch.cat([*(gate for gate, _ in gate_up), *(up for _, up in gate_up)]), whole(layer.gate_up)
        )


def test_any_checkpoint_can_be_quantised_as_it_is_read(tmp_path: Path) -> None:
    random_model("Qwen3", **CONFIG).save_pretrained(tmp_path)
    plain, fp8 = load(tmp_path), load(tmp_path, fp8=True)
    for before, after in zip(plain.layers, fp8.layers, strict=True):
        for name in QUANTIZED:
            weight, exact = getattr(after, name), getattr(before, name)
            assert weight.data.dtype == FP8
            step = 32 * weight.scale  # between the largest numbers
            assert ((weight.dequantize(torch.float32) - exact).abs() <= step / 2).all()
        assert torch.equal(before.input_norm, after.input_norm)
    assert torch.equal(plain.embedding, fp8.embedding)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda s: s.fill_(0.0), "weight_scale has a scale that is not positive and finite"),
        (lambda s: s.fill_(float("inf")), "weight_scale has a scale that is not positive and finite"),
        (lambda s: s.fill_(float("nan")), "weight_scale has a scale that is not positive and finite"),
        (
            lambda s: s[:-1].clone(),
            r"weight_scale has shape \(255, 1\); a weight of \(256, 256\) has one, 256 for the rows",
        ),
        (lambda s: None, "stored as F8_E4M3, and there is no weight_scale beside it"),
    ],
)
def test_a_wrong_scale_is_an_error_that_names_file_and_tensor(tmp_path: Path, bad: Any, message: str) -> None:
    save_fp8(tmp_path, "channel")
    path, name = tmp_path / "model.safetensors", "model.layers.1.self_attn.o_proj.weight_scale"
    tensors = load_file(path)
    tensors[name] = bad(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor model\.layers\.1\.self_attn\.o_proj.*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}},
            "int",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": GROUP["weights"]}}},
            "strategy None",
        ),
    ],
)
def test_an_unknown_scheme_is_refused_by_name(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    save_fp8(tmp_path, "channel")
    change_config(tmp_path, quantization_config=config)
    with pytest.raises(ModelError, match=rf"quantization_config: .*{named}.*what can be read: fp8 with blocks of 128"):
        read_spec(tmp_path)


@pytest.mark.parametrize("group", [None, BLOCK])
def test_quantised_rows_keep_their_largest_value(group: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, generator=generator) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 448.0])[:, None]
    data, scale = quantize(x, group)
    assert scale.shape == (5, 1 if group is None else 3)
    spread = scale.repeat_interleave(group or 300, dim=1)[:, :300]
    assert (data[3].float() == 0).all()
    assert (scale[3] == 1).all()
    assert ((data.float() * spread - x).abs() <= x.abs() / 16 + spread / 2**9).all()


@pytest.mark.parametrize("form", ["block", "channel"])
def test_the_twin_multiplies_what_is_quantised(form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, exact, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 256), (384, 256), (384,)))
    data, scale, _ = quantized(exact, form)
    weight = Fp8Weight(data, scale)
    assert weight.blocks == (form == "block")
    rows, steps = quantize(x, BLOCK if weight.blocks else None)
    spread = steps.repeat_interleave(BLOCK if weight.blocks else 256, dim=1)
    expected = (rows.float() * spread) @ weight.dequantize(torch.float32).t() + bias
    torch.testing.assert_close(linear(x, weight, bias), expected)
    error = (linear(x, weight) - x @ exact.t()).norm() / (x @ exact.t()).norm()
    assert error < 0.06
