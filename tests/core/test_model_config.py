import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minisgl.build import read_eos_token_ids
from minisgl.core.decoder import rope_table
from minisgl.core.model_config import ARCHITECTURES, Moe, Rope, read_spec
from minisgl.errors import ModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16, "mscale": 0.7}
TYPES = ["sliding_attention", *["full_attention"] * 3]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def write(folder: Path, name: str = "config.json", **values: Any) -> Path:
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_llama_config_of_version_4_or_5_is_read(tmp_path: Path) -> None:
    both: Any = {"num_key_value_heads": 2, "max_position_embeddings": 131072}
    version4: Any = {"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": LLAMA3}
    spec = read_spec(write(tmp_path, **LLAMA, **both, **version4))
    assert spec.rope.theta == 5e5
    assert [spec.rope.divisors[i] for i in (0, -1)] == [1.0, 8.0]
    assert (spec.num_kv_heads, spec.head_dim, spec.max_position, spec.checkpoint_dtype) == (2, 16, 131072, "bfloat16")
    assert spec.windows == (0, 0, 0, 0)
    version5: Any = {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert read_spec(write(tmp_path, **LLAMA, **both, **version5)) == spec


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    defaults = getattr(transformers, name.replace("ForCausalLM", "Config"))()
    kept = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if ARCHITECTURES[name].moe:
        kept += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
    sizes = {key: getattr(defaults, key) for key in kept}
    spec = read_spec(write(tmp_path, architectures=[name], **sizes))
    assert read_spec(write(tmp_path, model_type=ARCHITECTURES[name].model_type, **sizes)) == spec
    head_dim = getattr(defaults, "head_dim", None) or defaults.hidden_size // defaults.num_attention_heads
    window = defaults.sliding_window or 0 if name == "MistralForCausalLM" else 0
    assert (spec.num_kv_heads, spec.head_dim) == (defaults.num_key_value_heads, head_dim)
    assert (spec.max_position, spec.rms_eps) == (defaults.max_position_embeddings, defaults.rms_norm_eps)
    assert spec.tie_embeddings == defaults.tie_word_embeddings
    assert spec.rope == Rope(theta=defaults.rope_parameters["rope_theta"])
    assert spec.windows == (window,) * defaults.num_hidden_layers
    assert (spec.qkv_bias, spec.qk_norm) == (name == "Qwen2ForCausalLM", name.startswith("Qwen3"))


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2}, LLAMA3, YARN, {**YARN, "truncate": False}])
def test_rope_kinds_turn_as_those_of_transformers(tmp_path: Path, scaling: dict[str, Any]) -> None:
    spec = read_spec(write(tmp_path, **LLAMA, rope_scaling=scaling))
    parameters = {"rope_theta": 10000.0, "rope_type": scaling.get("type"), **scaling}
    config = transformers.LlamaConfig(**{**LLAMA, "rope_parameters": parameters})
    frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    table = rope_table(Rope(theta=spec.rope.theta, divisors=spec.rope.divisors), spec.head_dim, 2, frequencies.device)
    assert torch.allclose(table[1], torch.cat([frequencies.cos(), frequencies.sin()]), rtol=1e-6)
    assert spec.rope.scale == scale


def test_what_a_rope_leaves_out_follows_from_the_context(tmp_path: Path) -> None:
    def rope(**values: Any) -> Rope:
        return read_spec(write(tmp_path, **LLAMA, **values)).rope

    assert rope(rope_scaling={"rope_type": "default"}) == Rope(theta=10000.0)
    short = {"rope_type": "yarn", "original_max_position_embeddings": 256}
    assert rope(rope_scaling={**short, "factor": None}) == rope(rope_scaling={**short, "factor": 8.0})
    # an original context beside the rope parameters counts
    assert rope(rope_scaling=YARN, original_max_position_embeddings=256) == rope(rope_scaling={**YARN, **short})


@pytest.mark.parametrize(
    ("name", "extra", "windows"),
    [
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (0,) * 4),
        ("MistralForCausalLM", {"sliding_window": 5}, (5,) * 4),
        ("LlamaForCausalLM", {"sliding_window": 5}, (0,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 5}, (0,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, (0, 5, 5, 5)),
        ("Qwen3ForCausalLM", {"sliding_window": 5, "use_sliding_window": True, "layer_types": TYPES}, (5, 0, 0, 0)),
    ],
)
def test_windows(tmp_path: Path, name: str, extra: dict[str, Any], windows: tuple[int, ...]) -> None:
    values = {**LLAMA, "num_key_value_heads": 2, **extra, "architectures": [name]}
    assert read_spec(write(tmp_path, **values)).windows == windows


def test_moe_layers_follow_step_and_exceptions(tmp_path: Path) -> None:
    moe: Any = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    values = {**LLAMA, **moe, "architectures": ["Qwen3MoeForCausalLM"], "num_local_experts": 8, "norm_topk_prob": True}
    spec = read_spec(write(tmp_path, **values))
    assert spec.moe == Moe(num_experts=8, top_k=2, width=32, norm_topk_prob=True, layers=(False, True, False, False))


def test_eos_is_every_id_that_any_file_names(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", eos_token_id=[9, 3])
    write(tmp_path, "tokenizer_config.json", eos_token={"content": "<end>"})
    write(tmp_path, "tokenizer.json", added_tokens=[{"id": 11, "content": "<end>"}, {"id": 12, "content": "<x>"}])
    assert read_eos_token_ids(write(tmp_path, eos_token_id=[3, 100]), 100) == (9, 3, 11)
    write(tmp_path, "tokenizer_config.json", eos_token="<x>", added_tokens_decoder={"42": {"content": "<x>"}})
    assert read_eos_token_ids(tmp_path, 100) == (9, 3, 42)
    write(tmp_path, "tokenizer_config.json", eos_token="word")
    write(tmp_path, "tokenizer.json", model={"vocab": {"word": 13}})
    assert read_eos_token_ids(tmp_path, 100) == (9, 3, 13)
    with pytest.raises(ModelError, match=r"config\.json: eos_token_id must be"):
        read_eos_token_ids(write(tmp_path, eos_token_id="</s>"), 100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *ARCHITECTURES]),
        ({"architectures": "Llama"}, ["architectures", "list"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "integer", "'64'"]),
        ({"hidden_size": True}, ["hidden_size", "integer"]),
        ({"hidden_size": 65}, ["hidden_size", "multiple"]),
        ({"hidden_size": 2**31}, ["hidden_size", "at most 2147483647"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most"]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 10**9}, ["num_experts", "at most 10000"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor"]),
        ({"head_dim": 15}, ["head_dim", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "a positive number"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "bfloat16"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised", "gptq"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope", "default, linear, llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope_scaling", "factor", "missing"]),
        ({"rope_scaling": {"full_attention": {"rope_theta": 1.0}}}, ["rope_scaling", "per layer type"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_theta": 1}, ["rope_theta", "above 1"]),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor"]),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2, "num_experts_per_tok": 3},
            ["num_experts_per_tok", "at most the 2 experts", "got 3"],
        ),
    ],
)
def test_a_bad_config_is_refused_by_file_and_field(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        read_spec(write(tmp_path, **{**LLAMA, "num_key_value_heads": 4, **change}))
    assert all(word in caught.value.message for word in ["config.json", *words])


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"1e999"])
def test_a_file_that_is_missing_or_no_json_object_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: no such file" if content is None else r"config\.json"):
        read_spec(tmp_path)
