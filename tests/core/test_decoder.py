"""The decoder says what transformers says, however a sequence is cut into steps."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.driver import CPU, Driver
from helpers.tiny_models import MOE, random_model
from minisgl.core.attention import Attention, TorchAttention
from minisgl.core.decoder import pack_weights
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.weights import LayerWeights, Weights, dummy_weights, load_weights
from minisgl.gpu.attention.triton import TritonAttention
from minisgl.gpu.kernels.decode import DecodeAttention

PROMPT, GENERATED = 45, 64
SIZES = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 11}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama-all-kv-heads": ("Llama", {"num_key_value_heads": 4, "head_dim": 32}),
    "llama-linear": ("Llama", rope(rope_type="linear", factor=4.0)),
    "llama-llama3": ("Llama", rope(**LLAMA3, original_max_position_embeddings=32)),
    "llama-yarn": ("Llama", rope(**YARN)),
    "llama-yarn-mscale": ("Llama", rope(**YARN, mscale=1.3, mscale_all_dim=0.7, beta_fast=20, truncate=False)),
    "llama-yarn-factor": ("Llama", rope(**YARN, attention_factor=1.2)),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-window-yarn": ("Qwen3", {**WINDOW, "max_window_layers": 2, "head_dim": 16, **rope(**YARN)}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True, "head_dim": 32}),
    "qwen3-moe-raw": ("Qwen3Moe", {**MOE, "norm_topk_prob": False, "head_dim": 16, "decoder_sparse_step": 2}),
}


@functools.cache
def reference(case: str) -> tuple[ModelSpec, Weights, list[int], Tensor]:
    """A random model as we read it, and a prompt with transformers' greedy continuation and logits of all of it."""
    torch.set_num_threads(1)
    kind, extra = CASES[case]
    model = random_model(kind, std=0.15, **{**SIZES, **extra})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        spec = read_spec(Path(folder))
        weights = load_weights(Path(folder), spec, torch.float32, CPU)
    tokens = torch.randint(0, SIZES["vocab_size"], (1, PROMPT))
    with torch.inference_mode():
        for _ in range(GENERATED):
            logits = model(tokens).logits[0]
            tokens = torch.cat([tokens, logits[-1:].argmax(dim=-1, keepdim=True)], dim=1)
        logits = model(tokens).logits[0]
    return spec, weights, tokens[0].tolist(), logits


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= tolerance, f"off by {error:.2e} of the largest logit"


def check_greedy(driver: Driver, tokens: list[int], logits: Tensor) -> None:
    said = driver.step(chunks={0: tokens[:PROMPT]})
    assert_close(driver.logits, logits[:PROMPT])
    for position in range(PROMPT, PROMPT + GENERATED):
        said += driver.step(decode=[0])
        assert_close(driver.logits, logits[position : position + 1])
    assert said[:GENERATED] == tokens[PROMPT:]


@pytest.mark.parametrize("case", CASES)
def test_whole_prefill_and_greedy_decode_match_transformers(case: str) -> None:
    spec, weights, tokens, logits = reference(case)
    check_greedy(Driver(spec, weights), tokens, logits)


@pytest.mark.parametrize("case", CASES)
def test_chunks_beside_decodes_and_on_a_cached_prefix_match_transformers(case: str) -> None:
    spec, weights, tokens, logits = reference(case)
    driver = Driver(spec, weights)
    driver.step(chunks={1: tokens[:20]})
    start = 0
    for length in (7, 1, 20, PROMPT - 28):
        final = start + length == PROMPT
        said = driver.step(chunks={0: tokens[start : start + length]}, unfinished=[] if final else [0])
        assert_close(driver.logits, logits[start : start + length])
        start += length
    assert said == [tokens[PROMPT]]
    # Row 2 starts on 24 cached tokens of row 0, two chunks beside row 0's decode; row 3 has the same prompt, uncached.
    shared = driver.share(2, 0, 26)
    said = driver.step(decode=[0], chunks={2: tokens[24:30], 3: tokens[:40]}, unfinished=[2, 3], writes=shared)
    assert_close(driver.logits, torch.cat([logits[PROMPT : PROMPT + 1], logits[24:30], logits[:40]]))
    assert said == [tokens[PROMPT + 1]]
    said = driver.step(decode=[0], chunks={2: tokens[30:PROMPT], 3: tokens[40:PROMPT]})
    assert said == [tokens[PROMPT + 2], tokens[PROMPT], tokens[PROMPT]]
    said = driver.step(decode=[3, 0, 2])
    assert said == [tokens[PROMPT + 1], tokens[PROMPT + 3], tokens[PROMPT + 1]]
    assert_close(driver.logits, logits[[PROMPT, PROMPT + 2, PROMPT]])


@pytest.mark.parametrize("case", ["llama-tied-biased", "mistral-window", "qwen3"])
def test_attention_that_fuses_the_rotary_embedding_says_the_same(case: str) -> None:
    """In steps of decode rows alone; beside a chunk the same backend gets rotated queries."""
    spec, weights, _, _ = reference(case)
    plain, fused = Driver(spec, weights, page_size=16), Driver(spec, weights, page_size=16)
    fused.decoder.attention = Attention(TorchAttention(), TritonAttention(CPU))
    with mock.patch.object(DecodeAttention, "run_qkv", autospec=True, side_effect=DecodeAttention.run_qkv) as run_qkv:
        for decode, chunks in ([], {0: [3, 5, 7], 1: [4] * 20}), ([0, 1], {}), ([1], {2: [1, 2]}), ([0, 1, 2], {}):
            said = [driver.step(decode, chunks) for driver in (plain, fused)]
            assert said[0] == said[1]
            assert_close(fused.logits, plain.logits)
    assert run_qkv.call_count == 2 * spec.num_layers


def test_packed_weights_say_the_same() -> None:
    spec, weights, tokens, logits = reference("llama-tied-biased")
    packed = copy.deepcopy(weights)
    pack_weights(packed)
    check_greedy(Driver(spec, packed), tokens, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_full_precision(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    spec, _, tokens, _ = reference("qwen3")
    half = dummy_weights(spec, dtype, CPU)
    assert isinstance(half.head, torch.Tensor)
    layers = [LayerWeights(**{k: v.float() for k, v in vars(layer).items() if v is not None}) for layer in half.layers]
    full = Weights(half.embedding.float(), layers, half.norm.float(), half.head.float())
    rough, exact = Driver(spec, half, dtype=dtype), Driver(spec, full)
    for driver in (rough, exact):
        driver.step(chunks={0: tokens[:PROMPT]})
    assert_close(rough.logits.float(), exact.logits, 0.05)
