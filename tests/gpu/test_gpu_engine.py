"""The engine on a GPU: its tokens, which no switch changes, what it may write, and that its launches do not wait."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from helpers.driver import Driver
from helpers.gemm import error, in_blocks
from helpers.gpu import (
    DEVICE,
    SPEC,
    Built,
    agreement,
    build,
    compare_greedy,
    fused_driver,
    gpu_config,
    greedy,
    random_prompts,
    random_weights,
    reference_driver,
    require,
    to_float32,
)
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.model_config import ModelSpec, Moe, read_spec
from minisgl.core.quantization import quantize_fp8
from minisgl.core.types import FinishReason, ModelInfo, Request, SamplingParams
from minisgl.core.weights import TORCH_DTYPES, Weights
from minisgl.errors import ConfigError
from minisgl.gpu.cuda_graphs import DecodeGraphs
from minisgl.gpu.executor import build_local_executor

pytestmark = pytest.mark.gpu

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
# By how much the best logit, of logits with standard deviation 1, must lead for its token to be certain: seven standard
# deviations of a logit's error, 0.013 in bfloat16 and 0.0016 in float16.
MARGINS = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3}
BIASED = dataclasses.replace(
    SPEC, architecture="LlamaForCausalLM", num_heads=16, head_dim=64, qk_norm=False, qkv_bias=True, o_bias=True,
    mlp_bias=True,
)  # fmt: skip
# Each of its matrices is large enough for the streaming GEMM (`gpu/kernels/stream.py`).
WIDE: dict[str, Any] = {"hidden_size": 2048, "num_heads": 40, "num_kv_heads": 8, "intermediate_size": 4352}
# No expert is left out, so that rounding cannot change which are chosen.
ALL_EXPERTS = Moe(num_experts=4, top_k=4, width=256, norm_topk_prob=True, layers=(True, True))
FEW_EXPERTS = Moe(num_experts=8, top_k=2, width=256, norm_topk_prob=False, layers=(False, True))
SPECS = {
    "qwen3": SPEC,
    "qwen3-group5-dim64": dataclasses.replace(SPEC, num_heads=10, head_dim=64),
    "qwen3-group5": dataclasses.replace(SPEC, num_heads=10),
    "llama-biased-group8-dim64": BIASED,
    "qwen3-wide": dataclasses.replace(SPEC, **WIDE),
    "llama-wide-biased": dataclasses.replace(BIASED, **{**WIDE, "head_dim": 128}),
    "qwen3-moe": dataclasses.replace(SPEC, moe=ALL_EXPERTS),
    "qwen3-moe-sparse": dataclasses.replace(SPEC, moe=FEW_EXPERTS),
    "qwen3-window": dataclasses.replace(SPEC, windows=(0, 24)),
}
CASES = [
    *(("qwen3", "bfloat16", pair) for pair in ("auto", "fa,fi", "fa", "fi", "trtllm", "fa,trtllm", "triton", "torch")),
    *(("qwen3-group5-dim64", "bfloat16", pair) for pair in ("auto", "fa,fi", "fi,fa", "triton,fa")),
    *(("qwen3-group5", "bfloat16", pair) for pair in ("fa,trtllm", "fi,triton")),
    *(("llama-biased-group8-dim64", "float16", pair) for pair in ("fa", "triton")),
    ("qwen3-wide", "bfloat16", "auto"),
    ("llama-wide-biased", "float16", "triton"),
    ("qwen3-moe", "bfloat16", "auto"),
    ("qwen3-moe-sparse", "float32", "triton"),
    ("qwen3-window", "float16", "fa"),
    ("qwen3-window", "float32", "triton"),
]


@functools.cache
def weights(name: str, dtype: str) -> tuple[ModelSpec, Weights, Weights]:
    made = random_weights(SPECS[name], TORCH_DTYPES[dtype])
    return SPECS[name], made, to_float32(made)


@pytest.mark.parametrize(("name", "dtype", "pair"), CASES)
def test_greedy_tokens_are_those_of_float32_wherever_it_is_certain(
    name: str, dtype: str, pair: str, record_property: Callable[[str, object], None]
) -> None:
    """Graphs of padded batches beside eager steps, chunks beside decodes, pages of 16."""
    require(pair)
    spec, rough, exact = weights(name, dtype)
    graphs = 0 if pair == "torch" else 8
    built = build(spec, rough, gpu_config(dtype=dtype, attn=pair, cuda_graph_max_bs=graphs, max_prefill_length=200))
    prompts = random_prompts((1, 17, 64, 150, 300, 5, 33))
    answers = built.answer(greedy(prompts, 24))
    agreed = compare_greedy(spec, exact, prompts, answers, MARGINS[dtype])
    record_property("largest lead of a token that differs", round(agreed.largest, 4))
    assert agreed.wrong == 0, agreed
    assert agreed.sure > 0.5 * agreed.tokens, agreed


@pytest.mark.parametrize("quantize", [quantize_fp8, in_blocks])
def test_experts_in_fp8_have_the_twins_logits(quantize: Callable[[Any], Any]) -> None:
    spec, rough, _ = weights("qwen3-moe", "bfloat16")
    experts = ("expert_gate_up", "expert_down")
    layers = [
        dataclasses.replace(layer, **{name: quantize(getattr(layer, name)) for name in experts})
        for layer in rough.layers
    ]
    quantized = dataclasses.replace(rough, layers=layers)
    ours = fused_driver(spec, quantized, gpu_config(attn="triton"), 512)
    twin = Driver(spec, quantized, dtype=torch.bfloat16, device=DEVICE, max_seq_len=512)
    for prompt in random_prompts((300, 40, 1)):
        for driver in (ours, twin):
            driver.length[0], driver.free, driver.pages[0] = 0, driver.free + driver.pages[0], []
            driver.step(chunks={0: prompt})
        assert error(ours.logits, twin.logits.float()) < 4e-2


def mixed_requests() -> list[Request]:
    """Half greedy, half sampled from seeds; half share a prefix; some may stop on EOS."""
    shared = random_prompts([40], seed=1)[0]
    own = random_prompts([1 + 7 * i % 30 for i in range(20)], seed=2)
    made = []
    for i, tokens in enumerate(own):
        params = SamplingParams(
            temperature=0.8 * (i % 2), top_p=(1.0, 0.9, 1.0)[i % 3], top_k=(0, 0, 20)[i % 3], seed=i,
            max_tokens=6 + i % 9, ignore_eos=i % 4 != 0,
        )  # fmt: skip
        made.append(Request.make(id=str(i), prompt=(shared if i % 4 < 2 else []) + tokens, params=params))
    return made


def full_precision(**settings: object) -> Built:
    """float32, in which no batch shape and no order of sums can be seen in a token."""
    spec, _, exact = weights("qwen3-window", "bfloat16")
    config = gpu_config(**{"dtype": "float32", "attn": "triton", "num_pages": 64, **settings})
    return build(spec, exact, config, max_seq_len=128)


@functools.cache
def alone() -> list[list[int]]:
    """Each request with the engine to itself and everything off."""
    built = full_precision(cache="naive", overlap=False, max_running_requests=1, cuda_graph_max_bs=0)
    return built.answer(mixed_requests())


# Half of all cases, in which all settings of any three switches meet.
SWITCHES = [case for case in itertools.product([8, 3, 0], [1, 0], [1, 0], [1, 0]) if sum(case) % 2]


@pytest.mark.parametrize(("graphs", "overlap", "cache", "retract"), SWITCHES)
def test_no_switch_changes_a_token(graphs: int, overlap: int, cache: int, retract: int) -> None:
    built = full_precision(
        cuda_graph_max_bs=graphs, overlap=bool(overlap), cache="radix" if cache else "naive",
        max_prefill_length=8192 if overlap == retract else 7, piecewise_cuda_graph_max_tokens=(0, 40)[cache],
    )  # fmt: skip
    assert built.answer(mixed_requests(), retractions=8 if retract else 0) == alone()
    assert (built.engine.stats().retracted >= 4) == bool(retract)


def test_pages_running_out_under_graphs_change_no_token() -> None:
    small, requests = full_precision(num_pages=12), greedy(random_prompts([20] * 8, seed=3), 40)
    assert small.answer(requests) == full_precision(max_prefill_length=64).answer(requests)
    assert small.engine.stats().retracted > 0


@pytest.mark.parametrize(
    ("name", "pair"),
    [*(("qwen3", pair) for pair in ("auto", "fa", "fi", "fa,trtllm", "triton")), ("qwen3-wide", "auto")],
)
def test_switches_change_no_bit_at_fixed_batch_shapes(name: str, pair: str) -> None:
    """bfloat16: every step has the same rows, a graph of that very size, and rows too short to be split."""
    require(pair)
    spec, rough, _ = weights(name, "bfloat16")
    requests = greedy(random_prompts([3 + i for i in range(8)], seed=4), 40)
    configs = [
        gpu_config(attn=pair, cuda_graph_max_bs=graphs, overlap=overlap, cache="radix" if overlap else "naive")
        for graphs, overlap in itertools.product((0, 8), (False, True))
    ]
    answers = [build(spec, rough, config, max_seq_len=64).answer(requests) for config in configs]
    assert all(answer == answers[0] for answer in answers)


def test_padding_a_batch_changes_no_certain_token(record_property: Callable[[str, object], None]) -> None:
    """Five rows in a graph of eight: other shapes of GEMMs, so equal only where float32 is certain."""
    spec, rough, exact = weights("qwen3", "bfloat16")
    prompts = random_prompts([20 + i for i in range(5)], seed=5)
    eager = build(spec, rough, gpu_config(cuda_graph_max_bs=0)).answer(greedy(prompts, 48))
    padded = build(spec, rough, gpu_config()).answer(greedy(prompts, 48))
    equal = [a == b for one, other in zip(eager, padded, strict=True) for a, b in zip(one, other, strict=True)]
    record_property("equal tokens of all, 5 rows eager and in a graph of 8", (sum(equal), len(equal)))
    for answers in (eager, padded):
        assert compare_greedy(spec, exact, prompts, answers, MARGINS["bfloat16"]).wrong == 0


def test_a_seed_says_the_same_alone_and_among_others() -> None:
    prompt = random_prompts([9], seed=6)[0]
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)
    wanted = Request.make(id="wanted", prompt=prompt, params=params)
    by_itself = full_precision().answer([wanted])[0]
    assert full_precision().answer([*mixed_requests()[:7], wanted])[-1] == by_itself
    unlike = Request.make(id="unlike", prompt=prompt, params=msgspec.structs.replace(params, seed=12))
    assert full_precision().answer([unlike])[0] != by_itself


@pytest.mark.parametrize("largest", [0, 1, 3, 8, 13])
def test_graphs_go_exactly_up_to_the_batch_asked_for(largest: int) -> None:
    spec, rough, _ = weights("qwen3", "bfloat16")
    built = build(spec, rough, gpu_config(cuda_graph_max_bs=largest, max_running_requests=16, overlap=False))
    graphs = next((graphs for graphs in built.runner.graphs if isinstance(graphs, DecodeGraphs)), None)
    if largest == 0:
        assert graphs is None
        return
    assert graphs is not None
    assert graphs.sizes[-1] == largest
    for rows, replayed in ((largest, True), (largest + 1, False)):
        built.answer(greedy(random_prompts([4] * rows, seed=7), 3))
        plan = next(plan for plan in reversed(built.executor.plans) if len(plan.decode_slots) == rows)
        assert graphs.takes(plan) == replayed


@pytest.mark.parametrize("pair", ["auto", "triton"])
def test_a_padded_replay_writes_only_its_rows_next_place_and_scratch(pair: str) -> None:
    require(pair)
    spec, rough, _ = weights("qwen3", "bfloat16")
    built = build(spec, rough, gpu_config(attn=pair, page_size=16, num_pages=64, overlap=False))
    engine, kv, tables = built.engine, built.runner.kv, built.runner.tables
    for request in greedy(random_prompts((5, 30, 16, 90, 47), seed=8), 24):
        engine.add(request)
    engine.step()  # all prompts
    for _ in range(20):
        torch.cuda.synchronize()
        before, lengths = (kv.k.clone(), kv.v.clone()), tables.length.clone()
        engine.step()
        torch.cuda.synchronize()
        plan = built.executor.plans[-1]
        assert (len(plan.decode_slots), len(plan.prefill_slots)) == (5, 0)
        pages = tables.page_table.cpu()[torch.from_numpy(plan.decode_slots).long(), plan.decode_lens // 16]
        expected = set(zip(pages.tolist(), (plan.decode_lens % 16).tolist(), strict=True))
        for old, new in zip(before, (kv.k, kv.v), strict=True):
            differs = (old != new).any(dim=-1).any(dim=-1).any(dim=0)  # (page, offset), in any layer
            assert {(page, offset) for page, offset in differs.nonzero().tolist() if page != kv.num_pages} == expected
        grown = (tables.length - lengths).cpu().numpy()
        assert sorted(np.flatnonzero(grown).tolist()) == sorted(plan.decode_slots.tolist())
        assert grown.max() == 1
        assert int(tables.length[-1]) == 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    ("name", "pair", "graphs"),
    [*itertools.product(["qwen3"], ["auto", "fa", "fi", "fa,trtllm", "triton"], [8, 0]), ("qwen3-moe", "auto", 8)],
)
def test_launching_a_step_waits_for_nothing(name: str, pair: str, graphs: int) -> None:
    require(pair)
    spec, rough, _ = weights(name, "bfloat16")
    config = gpu_config(attn=pair, cuda_graph_max_bs=graphs, max_prefill_length=100)
    built = build(spec, rough, config.replace(piecewise_cuda_graph_max_tokens=8 * graphs))
    built.answer(greedy(random_prompts((5, 120, 64, 9, 33, 70), seed=8), 20))  # compiles what is not yet compiled
    built.executor.strict = True
    answers = built.answer(greedy(random_prompts((5, 120, 64, 9, 33, 70), seed=9), 20))
    assert [len(tokens) for tokens in answers] == [20] * 6


def test_a_prompt_of_128k_tokens_beside_a_full_cache_is_answered_as_in_float32() -> None:
    length, said = 2**17, 8
    spec, rough, exact = weights("qwen3-group5-dim64", "bfloat16")
    pages = -(-(length + said) // 16)
    built = build(spec, rough, gpu_config(num_pages=pages), max_seq_len=length + said)
    built.answer(greedy(random_prompts([8000] * 20, seed=9), 2))
    assert built.engine.cache.num_cached > 0.9 * pages
    prompt = random_prompts([length], seed=10)[0]
    answer = built.answer(greedy([prompt], said))[0]
    assert len(answer) == said
    assert sum(len(plan.prefill_tokens) > 0 for plan in built.executor.plans) >= 16 + 20
    driver = reference_driver(spec, exact, length + said)
    for start in range(0, length, 8192):
        driver.step(chunks={0: prompt[start : start + 8192]})
    first = driver.logits[-1:]
    driver.step(chunks={0: answer[:-1]})
    assert agreement(torch.cat([first, driver.logits]), answer, MARGINS["bfloat16"]).wrong == 0


def test_a_prompt_of_128k_tokens_fits_beside_what_is_measured_for_a_real_shape() -> None:
    """Qwen3-0.6B in default settings: the pages that --memory-ratio leaves, and no memory runs out."""
    folder = MODELS / "Qwen3-0.6B"
    spec, limit = read_spec(folder), 2**17 + 16
    config = gpu_config(dummy_weight=True, num_pages=None, cuda_graph_max_bs=4, max_running_requests=256)
    executor = build_local_executor(config, folder, spec, limit)
    try:
        assert executor.num_pages * config.page_size > 2**19
        model = ModelInfo(name="qwen", vocab_size=spec.vocab_size, max_seq_len=limit, eos_token_ids=(0,))
        engine = Engine(executor, model, config)
        engine.add(greedy([[7, 11, 13, 17] * 2**15], 8)[0])
        events = []
        while engine.has_work:
            events += engine.step()
        assert sum(len(event.tokens) for event in events) == 8
        assert events[-1].finish is FinishReason.LENGTH
    finally:
        executor.close()


def pages_of(config: Config, spec: ModelSpec = SPEC) -> int:
    executor = build_local_executor(config.replace(dummy_weight=True), Path(), spec, 512)
    executor.close()
    return executor.num_pages


def test_pages_are_as_many_as_asked_for_or_as_fit_or_are_refused_with_the_numbers() -> None:
    torch.cuda.empty_cache()
    assert pages_of(gpu_config(num_pages=77)) == 77
    free = torch.cuda.mem_get_info(DEVICE)[0]
    page = 2 * SPEC.num_layers * 16 * SPEC.num_kv_heads * SPEC.head_dim * 2
    pages = pages_of(gpu_config(num_pages=None, memory_ratio=0.05, cuda_graph_max_bs=0))
    assert 0.04 * free < pages * page < 0.05 * free
    message = r"--num-pages 100000000 needs \d+\.\d+ GiB, and there are \d+\.\d+ GiB of memory in all"
    with pytest.raises(ConfigError, match=message):
        pages_of(gpu_config(num_pages=10**8))
    message = r"no KV page fits: .* GiB .* \(--memory-ratio\), and weights, activations and CUDA graphs"
    with pytest.raises(ConfigError, match=message):
        pages_of(gpu_config(num_pages=None, memory_ratio=1e-5))


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    # The largest model in the repository, three times as deep.
    spec = read_spec(MODELS / "Qwen3-32B")
    deep = dataclasses.replace(spec, num_layers=3 * spec.num_layers, windows=spec.windows * 3)
    refusal = ""
    try:
        pages_of(gpu_config(num_pages=None), deep)
    except (ConfigError, torch.OutOfMemoryError) as error:  # not raised on: a traceback would hold the weights
        refusal = str(error) if isinstance(error, ConfigError) else "out of memory"
    assert re.search(r"\d+\.\d+ GiB", refusal), refusal
