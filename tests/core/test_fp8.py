"""FP8: checkpoints as Qwen and compressed-tensors write them, scales for keys and values, quantising, the twins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.driver import CPU, Driver
from helpers.gemm import in_blocks
from helpers.tiny_models import SIZES, random_model
from minisgl.config import Config
from minisgl.core import quantization
from minisgl.core.model_config import read_spec
from minisgl.core.ops import linear, moe
from minisgl.core.quantization import BLOCK, FP8, FP8_MAX, Fp8Weight, quantize, quantize_fp8
from minisgl.core.weights import Weights, dummy_weights, load_weights
from minisgl.distributed.shard import local_spec, sharder
from minisgl.errors import ModelError
from minisgl.gpu.executor import build_local_executor

DENSE, EXPERTS = ("qkv", "o", "gate_up", "down"), ("expert_gate_up", "expert_down")
CONFIG = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "head_dim": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
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
        blocks = in_blocks(weight)
        return blocks.data, blocks.scale, "weight_scale_inv"
    scale = weight.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scale = scale if form == "channel" else scale.max().reshape(1)
    return (weight / scale).to(FP8), scale, "weight_scale"


def save_fp8(folder: Path, form: str, kept: tuple[str, ...] = (), kind: str = "Qwen3", **config: Any) -> None:
    """A random model in this form of FP8; modules whose names hold a word of `kept` stay as they are."""
    sizes = {**CONFIG, **(MOE if kind == "Qwen3Moe" else {}), **config}
    random_model(kind, **sizes).save_pretrained(folder)
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


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fuse_experts(tensors: dict[str, Tensor]) -> None:
    """Experts, and their scales, as one tensor for all, as transformers keeps them in memory."""
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        for suffix in ("weight", "weight_scale_inv", "weight_scale"):
            if f"{prefix}0.up_proj.{suffix}" in tensors:
                parts = [[tensors.pop(f"{prefix}{i}.{x}_proj.{suffix}") for i in range(4)] for x in ("gate", "up")]
                added = suffix.removeprefix("weight")
                tensors[f"{prefix}gate_up_proj{added}"] = torch.cat([torch.stack(part) for part in parts], dim=1)
                downs = [tensors.pop(f"{prefix}{i}.down_proj.{suffix}") for i in range(4)]
                tensors[f"{prefix}down_proj{added}"] = torch.stack(downs)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def load(folder: Path, rank: int = 0, size: int = 1, fp8: bool = False, kv_scales: bool = False) -> Weights:
    spec = read_spec(folder)
    return load_weights(
        folder,
        spec,
        torch.float32,
        CPU,
        sharder=sharder(spec, rank, size) if size > 1 else None,
        quantize=quantize_fp8 if fp8 else None,
        kv_scales=kv_scales,
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
        assert all(isinstance(getattr(layer, name), Fp8Weight) for name in DENSE)
        for name, parts in {"qkv": "q k v", "o": "o", "gate_up": "gate up", "down": "down"}.items():
            expected = []
            for part in parts.split():
                module = f"model.layers.{index}.{'mlp' if name in ('gate_up', 'down') else 'self_attn'}.{part}_proj"
                expected.append(exact(stored, module, form))
            assert torch.equal(whole(getattr(layer, name)), torch.cat(expected))


def test_what_a_checkpoint_leaves_in_full_precision_stays_so(tmp_path: Path) -> None:
    save_fp8(tmp_path, "channel", kept=("layers.0.self_attn.", "down"))
    first, second = load(tmp_path).layers
    assert [isinstance(getattr(first, name), Fp8Weight) for name in DENSE] == [False, False, True, False]
    assert [isinstance(getattr(second, name), Fp8Weight) for name in DENSE] == [True, True, True, False]
    save_fp8(tmp_path, "channel", kept=("k_proj",))
    with pytest.raises(ModelError, match=r"q_proj.weight is in FP8, .*k_proj.weight is not, and"):
        load(tmp_path)


@pytest.mark.parametrize("hidden", [256, 192])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["block", "channel", "tensor", "static"])
def test_experts_are_read_in_each_form_and_stay_in_fp8(tmp_path: Path, form: str, fused: bool, hidden: int) -> None:
    save_fp8(tmp_path, form, kind="Qwen3Moe", hidden_size=hidden)
    stored = load_file(tmp_path / "model.safetensors")
    if fused and form in ("block", "channel"):  # a tensor for all experts has no scale a matrix
        change_tensors(tmp_path, fuse_experts)
    for index, layer in enumerate(load(tmp_path).layers):
        assert all(isinstance(getattr(layer, name), Fp8Weight) for name in ("qkv", "o", *EXPERTS))
        assert torch.equal(whole(layer.router), stored[f"model.layers.{index}.mlp.gate.weight"])
        for name, parts in {"expert_gate_up": "gate up", "expert_down": "down"}.items():
            weight = getattr(layer, name)
            assert weight.blocks == (form == "block")
            for expert in range(4):
                modules = [f"model.layers.{index}.mlp.experts.{expert}.{part}_proj" for part in parts.split()]
                expected = torch.cat([exact(stored, module, form) for module in modules])
                assert torch.equal(whole(weight)[expert], expected)
                assert torch.equal(whole(weight[expert]), expected)


def exact(stored: dict[str, Tensor], module: str, form: str) -> Tensor:
    """What the tensors of a module mean."""
    scale = stored[f"{module}.weight_scale_inv" if form == "block" else f"{module}.weight_scale"]
    data = stored[f"{module}.weight"].float()
    spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) if form == "block" else scale
    return data * spread[: data.shape[0], : data.shape[1]] if form == "block" else data * spread


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["block", "channel", "online"])
def test_shards_of_experts_are_those_of_the_whole(tmp_path: Path, form: str, fused: bool) -> None:
    online = form == "online"
    save_fp8(tmp_path, "channel" if online else form, ("proj",) if online else (), "Qwen3Moe")
    if online:
        change_config(tmp_path, quantization_config=None)
    if fused:
        change_tensors(tmp_path, fuse_experts)
    together, ranks = load(tmp_path, fp8=online), [load(tmp_path, rank, 2, online) for rank in range(2)]
    for index, layer in enumerate(together.layers):
        downs = torch.cat([whole(rank.layers[index].expert_down) for rank in ranks], dim=2)
        # online, a rank's scale is of its own columns
        torch.testing.assert_close(downs, whole(layer.expert_down), atol=0.04 if online else 0.0, rtol=0.0)
        halves = [whole(rank.layers[index].expert_gate_up).chunk(2, dim=1) for rank in ranks]
        joined = torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)], dim=1)
        assert torch.equal(joined, whole(layer.expert_gate_up))
        x = torch.randn(9, 256, generator=torch.Generator().manual_seed(3))
        together_out, *rank_outs = (sparse_layer(x, weights, index) for weights in (together, *ranks))
        # in blocks a run of 128 activations is the same on a rank, otherwise a row is a part of the whole one
        limit = 1e-5 if form == "block" else 0.04
        assert (sum(rank_outs) - together_out).norm() < limit * together_out.norm()


def sparse_layer(x: Tensor, weights: Weights, index: int) -> Tensor:
    layer: Any = weights.layers[index]
    return moe(x, layer.router, layer.expert_gate_up, layer.expert_down, 2, True)


def test_ranks_that_split_a_block_of_an_expert_are_refused(tmp_path: Path) -> None:
    save_fp8(tmp_path, "block", kind="Qwen3Moe", moe_intermediate_size=128)
    load(tmp_path)
    with pytest.raises(
        ModelError, match=r"experts\.0\.gate_proj\.weight: a part from 0 to 64 splits a block of 128; use"
    ):
        load(tmp_path, 0, 2)


def test_experts_are_quantised_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
        sizes.append(x.numel())
        return quantize(x, group)

    monkeypatch.setattr(quantization, "quantize", counted)
    random_model("Qwen3Moe", **CONFIG, **MOE).save_pretrained(tmp_path)
    plain, fp8, made_up = load(tmp_path), load(tmp_path, fp8=True), dummy_weights(
        read_spec(tmp_path), torch.float32, CPU, quantize=quantize_fp8
    )  # fmt: skip
    assert max(sizes) == 3 * 256 * 256  # qkv; an expert's gate and up are 2 * 256 * 256
    for before, after, dummy in zip(plain.layers, fp8.layers, made_up.layers, strict=True):
        assert torch.equal(whole(before.router), whole(after.router))
        for name in EXPERTS:
            weight, unquantized = getattr(after, name), getattr(before, name)
            assert weight.data.dtype == getattr(dummy, name).data.dtype == FP8
            assert getattr(dummy, name).scale.shape == weight.scale.shape == (*unquantized.shape[:2], 1)
            assert ((whole(weight) - unquantized).abs() <= 16 * weight.scale).all()  # half of the largest step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t[name].fill_(0.0), "weight_scale has a scale that is not positive and finite"),
        (lambda t, name: t[name].fill_(float("nan")), "weight_scale has a scale that is not positive and finite"),
        (
            lambda t, name: t.update({name: t[name][:-1].clone()}),
            r"weight_scale has shape \(255, 1\); a weight of \(256, 256\) has one, 256 for the rows or \(2, 2\) for",
        ),
        (lambda t, name: t.pop(name), "weight is stored as F8_E4M3, and there is no weight_scale beside it"),
    ],
)
def test_a_wrong_scale_of_an_expert_is_an_error_that_names_file_and_tensor(
    tmp_path: Path, change: Any, message: str
) -> None:
    save_fp8(tmp_path, "channel", kind="Qwen3Moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    change_tensors(tmp_path, lambda tensors: change(tensors, name))
    with pytest.raises(
        ModelError, match=rf"model\.safetensors: tensor model\.layers\.1\.mlp\.experts\.2\.up_proj\.{message}"
    ):
        load(tmp_path)


def test_wrong_scales_of_all_experts_and_experts_partly_in_fp8_are_refused(tmp_path: Path) -> None:
    save_fp8(tmp_path, "block", ("experts.2.down",), "Qwen3Moe")
    with pytest.raises(
        ModelError, match=r"experts\.0\.down_proj\.weight is in FP8, .*\.2\.down_proj\.weight is not, and"
    ):
        load(tmp_path)
    save_fp8(tmp_path, "block", kind="Qwen3Moe")
    change_tensors(tmp_path, fuse_experts)
    name = "model.layers.0.mlp.experts.gate_up_proj_scale_inv"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :3].clone()}))
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} has shape \(4, 3, 2\).*\(4, 4, 2\) for"):
        load(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj is stored .* no gate_up_proj_scale beside it"):
        load(tmp_path)


def log_probs(folder: Path, weights: Weights, kv_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Driver]:
    driver = Driver(read_spec(folder), weights, dtype=kv_dtype, num_pages=16)
    driver.step(chunks={0: torch.randint(410, (40,), generator=torch.Generator().manual_seed(0)).tolist()})
    return driver.logits.log_softmax(dim=-1), driver


@pytest.mark.parametrize("form", ["block", "channel"])
def test_a_model_with_experts_in_fp8_says_about_what_it_said_before(tmp_path: Path, form: str) -> None:
    random_model("Qwen3Moe", **CONFIG, **{**MOE, "num_experts_per_tok": 4}).save_pretrained(tmp_path)
    before, _ = log_probs(tmp_path, load(tmp_path))
    save_fp8(tmp_path, form, ("self_attn",), "Qwen3Moe", num_experts_per_tok=4)
    after, _ = log_probs(tmp_path, load(tmp_path))
    error = float((after - before).norm() / (before - before.mean()).norm())
    assert 1e-4 < error < 0.1


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
        for name in DENSE:
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


@pytest.mark.parametrize("form", ["block", "channel"])
def test_the_twin_of_experts_quantises_what_enters_both_matrices(form: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, router = (torch.randn(*shape, generator=generator) for shape in ((6, 256), (3, 256)))
    exact_up = torch.randn(3, 512, 256, generator=generator) / 16
    exact_down = torch.randn(3, 256, 256, generator=generator) / 16

    def stacked(experts: Tensor) -> Fp8Weight:
        parts = [quantized(expert, form) for expert in experts]
        return Fp8Weight(torch.stack([data for data, _, _ in parts]), torch.stack([scale for _, scale, _ in parts]))

    gate_up, down = stacked(exact_up), stacked(exact_down)
    assert gate_up.blocks == down.blocks == (form == "block")
    shares = (x @ router.t()).softmax(dim=-1)  # all three are chosen
    expected = torch.zeros(6, 256)
    for expert in range(3):
        gate, up = linear(x, gate_up[expert]).chunk(2, dim=-1)
        expected += shares[:, expert, None] * linear(torch.nn.functional.silu(gate) * up, down[expert])
    torch.testing.assert_close(moe(x, router, gate_up, down, 3, False), expected, rtol=1e-4, atol=1e-5)
    plain = moe(x, router, exact_up, exact_down, 3, False)
    assert 1e-3 < (expected - plain).norm() / plain.norm() < 0.1


KV_SCALES = {
    "model.layers.0.self_attn.k_scale": 3.1, "model.layers.0.self_attn.v_scale": 0.011,
    "model.layers.1.self_attn.k_scale": 0.03, "model.layers.1.self_attn.v_scale": 1.0,
}  # fmt: skip
ROUNDED_UP = {0: (4.0, 2.0**-6), 1: (2.0**-5, 1.0)}  # by layer: of keys, of values


def add_kv_scales(folder: Path, rename: Callable[[str], str] = lambda name: name, **changed: Tensor) -> None:
    scales = {rename(name): torch.tensor(scale) for name, scale in KV_SCALES.items()}
    change_tensors(folder, lambda tensors: tensors.update(scales))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace("k_scale", "k_proj.output_scale").replace("v_scale", "v_proj.output_scale"),
        lambda name: name.replace("k_scale", "k_proj.k_scale").replace("v_scale", "v_proj.v_scale"),
    ],
)
def test_kv_scales_change_what_is_cached_and_nothing_that_is_said(
    tmp_path: Path, kind: str, rename: Callable[[str], str]
) -> None:
    biases = {"attention_bias": True} if kind == "Llama" else {}
    random_model(kind, **CONFIG, **biases).save_pretrained(tmp_path)
    add_kv_scales(tmp_path, rename)
    expected, before = log_probs(tmp_path, load(tmp_path))
    found, after = log_probs(tmp_path, load(tmp_path, kv_scales=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for layer, (k, v) in ROUNDED_UP.items():
        kv, plain = after.runner.kv, before.runner.kv
        torch.testing.assert_close(kv.k[layer] * k, plain.k[layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kv.v[layer] * v, plain.v[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["block", "channel", "tensor", "online"])
def test_kv_scales_are_folded_exactly_into_weights_in_fp8_and_into_shards(tmp_path: Path, form: str) -> None:
    save_fp8(tmp_path, "channel" if form == "online" else form, ("proj",) if form == "online" else (), "Llama")
    add_kv_scales(tmp_path)
    for rank, size in ((0, 1), (1, 2)):
        plain, scaled = (load(tmp_path, rank, size, form == "online", kv_scales) for kv_scales in (False, True))
        for layer, (k, v) in ROUNDED_UP.items():
            before, after = plain.layers[layer], scaled.layers[layer]
            q_rows, k_rows, v_rows = whole(before.qkv).chunk(3)
            assert torch.equal(whole(after.qkv), torch.cat([q_rows * k, k_rows / k, v_rows / v]))
            assert torch.equal(whole(after.o), whole(before.o) * v)
            assert torch.equal(whole(after.down), whole(before.down))


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_keys_too_large_for_fp8_are_right_with_their_scale(tmp_path: Path, kind: str) -> None:
    random_model(kind, std=0.06, **CONFIG).save_pretrained(tmp_path)

    def enlarge(tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            module = f"model.layers.{layer}.self_attn."
            key, query = ("k_norm", "q_norm") if kind == "Qwen3" else ("k_proj", "q_proj")
            tensors[f"{module}{key}.weight"] *= 1000
            tensors[f"{module}{query}.weight"] /= 1000

    change_tensors(tmp_path, enlarge)
    expected, driver = log_probs(tmp_path, load(tmp_path))
    largest = [float(k.abs().max()) for k in driver.runner.kv.k]
    assert min(largest) > 2 * FP8_MAX
    scales = {f"model.layers.{i}.self_attn.k_scale": torch.tensor([k / FP8_MAX]) for i, k in enumerate(largest)}
    change_tensors(tmp_path, lambda tensors: tensors.update(scales))

    def error(kv_scales: bool) -> float:
        found, driver = log_probs(tmp_path, load(tmp_path, kv_scales=kv_scales), FP8)
        assert (driver.runner.kv.k.float().abs().max() == FP8_MAX) == (not kv_scales)
        return float((found - expected).norm() / (expected - expected.mean()).norm())

    assert error(kv_scales=True) < 0.03
    assert error(kv_scales=False) > 0.1


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(0.0), "has a scale that is not positive and finite"),
        (torch.tensor([-1.0]), "has a scale that is not positive and finite"),
        (torch.tensor(float("inf")), "has a scale that is not positive and finite"),
        (torch.ones(4), r"has shape \(4,\); a layer has one scale"),
    ],
)
def test_a_wrong_kv_scale_is_an_error_that_names_file_and_tensor(tmp_path: Path, scale: Tensor, message: str) -> None:
    random_model("Qwen3", **CONFIG).save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.v_scale"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: scale}))
    load(tmp_path)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} {message}"):
        load(tmp_path, kv_scales=True)


def test_kv_scales_are_for_a_cache_in_fp8_only(tmp_path: Path) -> None:
    random_model("Qwen3", **CONFIG).save_pretrained(tmp_path)
    add_kv_scales(tmp_path)
    config = Config(
        device="cpu", dtype="float32", attn="torch,torch", cuda_graph_max_bs=0, max_running_requests=4,
        max_prefill_length=32, num_pages=8,
    )  # fmt: skip
    norms: list[Any] = []
    for kept in ("auto", "fp8_e4m3"):
        executor = build_local_executor(config.replace(kv_cache_dtype=kept), tmp_path, read_spec(tmp_path), 64)
        norms.append(executor.runner.decoder.weights.layers[0].k_norm)
        executor.close()
    assert torch.equal(norms[0], whole(load(tmp_path).layers[0].k_norm))
    assert torch.equal(norms[0], norms[1] * ROUNDED_UP[0][0])
