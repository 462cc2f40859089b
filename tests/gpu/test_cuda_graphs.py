"""Graphs for steps with prompts: their sizes, and that steps write and sample the same as without them."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from helpers.driver import CPU, Driver
from helpers.gpu import SPEC, build, gpu_config, graph_driver, random_prompts, random_weights, require
from helpers.tp_cases import SPECS
from minisgl.core.attention import Attention, PlannedAttention, TorchAttention
from minisgl.core.kv_cache import KVCache
from minisgl.core.model_config import ModelSpec, Moe
from minisgl.core.model_runner import ModelRunner
from minisgl.core.types import Request, SamplingParams
from minisgl.core.weights import dummy_weights
from minisgl.gpu import cuda_graphs
from minisgl.gpu.attention import interface
from minisgl.gpu.attention.interface import DeviceBatch, GraphDecode
from minisgl.gpu.attention.triton import TritonAttention
from minisgl.gpu.cuda_graphs import Capture, DecodeGraphs, MixedGraphs, PiecewiseGraphs, Work, piecewise_sizes
from minisgl.gpu.kernels.attention import merge_rows


@pytest.mark.parametrize("largest", [1, 16, 100, 512, 1000, 1024, 2048, 2500])
def test_sizes_end_with_the_largest_and_waste_little(largest: int) -> None:
    sizes = piecewise_sizes(largest)
    assert sizes[-1] == largest
    assert sizes == sorted(set(sizes))
    assert all(above <= max(1.51 * (below + 1), below + 16) for below, above in itertools.pairwise(sizes))
    assert len(sizes) <= 25
    assert piecewise_sizes(0) == []


@pytest.mark.parametrize(
    ("model", "attn"),
    [
        ("qwen3", "torch"),
        ("llama-biased", "torch"),
        ("qwen3-moe", "torch"),
        ("mistral", "torch"),
        ("mistral", "triton"),
    ],
)
def test_captured_steps_write_and_sample_what_others_do(model: str, attn: str) -> None:
    torch.set_num_threads(1)
    spec = SPECS[model]
    weights = dummy_weights(spec, torch.float32, CPU)
    plain, parts = Driver(spec, weights), Driver(spec, weights)
    replays = []

    def capture(work: Work) -> Work:
        return lambda: replays.append((work, work()))

    if attn == "triton":
        capture_mixed(parts.runner, 20, capture)
    else:
        parts.runner.forward = PiecewiseGraphs(parts.decoder, parts.runner.kv, 20, capture).forward
    tokens = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5, 0, 11, 13, 2, 2, 9, 30]
    sampled = [
        [
            driver.step(chunks={0: tokens, 1: tokens[:2]}),  # 19 of 20
            driver.step(decode=[0], chunks={2: tokens[:9]}, unfinished=[2]),  # 10 of 16, where 20 were
            driver.step(chunks={2: tokens[3:5]}, unfinished=[2]),  # no token is sampled
            driver.step(decode=[0, 1]),  # no prompts: not captured
            driver.step(decode=[1], chunks={2: tokens, 3: tokens[:5]}),  # 23, too many
            driver.step(decode=[0, 1, 2], chunks={3: tokens[6:]}),
        ]
        for driver in (plain, parts)
    ]
    assert sampled[0] == sampled[1]
    assert len(replays) == 4 * (1 if attn == "triton" else spec.num_layers)
    if attn == "triton":  # steps without decodes have graphs of their own
        assert [work.args[0].decodes > 0 for work, _ in replays if isinstance(work, partial)] == [
            False,
            True,
            False,
            True,
        ]
    for old, new in zip(plain.runner.kv.k[:, :-1], parts.runner.kv.k[:, :-1], strict=True):
        torch.testing.assert_close(old, new)
        assert torch.equal(old == 0, new == 0)


EXPERTS = Moe(num_experts=8, top_k=2, width=256, norm_topk_prob=True, layers=(True, True))
GPU_SPECS = {"qwen3": SPEC, "qwen3-moe": dataclasses.replace(SPEC, moe=EXPERTS)}


def pair_of_drivers(spec: ModelSpec, largest: int, attn: str) -> list[Driver]:
    """The same model launch by launch, and with graphs of up to `largest` tokens."""
    require(attn)
    weights = random_weights(spec, torch.bfloat16)
    configs = [gpu_config(attn=attn, piecewise_cuda_graph_max_tokens=tokens) for tokens in (0, largest)]
    return [graph_driver(spec, weights, config, 512) for config in configs]


def cached(driver: Driver) -> list[torch.Tensor]:
    """Keys and values outside the scratch page."""
    return [driver.runner.kv.k[:, :-1], driver.runner.kv.v[:, :-1]]


@pytest.mark.gpu
@pytest.mark.parametrize("model", list(GPU_SPECS))
@pytest.mark.parametrize("attn", ["auto", "fa", "fi", "triton"])
def test_steps_of_a_captured_size_are_the_same(model: str, attn: str) -> None:
    first, second, third = random_prompts([40, 24, 30], seed=1)
    sampled = []
    drivers = pair_of_drivers(GPU_SPECS[model], 64, attn)
    for driver in drivers:
        tokens = driver.step(chunks={0: first, 1: second})  # 64
        tokens += driver.step(decode=[0, 1], chunks={2: third})  # 32
        tokens += driver.step(chunks={3: third[:16]}, unfinished=[3])  # 16, of which nobody asks for one
        sampled.append(tokens + driver.step(decode=[0, 1, 2], chunks={3: second[:13]}))  # 16
    assert (attn == "fi") == (drivers[1].runner.forward != drivers[1].runner.decoder.forward)
    assert any(isinstance(graphs, MixedGraphs) for graphs in drivers[1].runner.graphs) == (attn != "fi")
    assert not any(isinstance(graphs, MixedGraphs) for graphs in drivers[0].runner.graphs)
    assert sampled[0] == sampled[1]
    for old, new in zip(*map(cached, drivers), strict=True):
        if attn == "fi":  # to the bit; others split a captured step's rows another way
            assert torch.equal(old, new)
        assert torch.equal(old == 0, new == 0)
        torch.testing.assert_close(old, new, atol=0.05, rtol=0.05)


@pytest.mark.gpu
def test_padding_writes_nowhere_but_to_scratch() -> None:
    long, short = random_prompts([60, 21], seed=2)
    drivers = pair_of_drivers(GPU_SPECS["qwen3"], 64, "auto")
    for driver in drivers:
        driver.step(chunks={0: long})
        driver.step(chunks={1: short})  # where the padding of the step before was written, and its places still are
    for old, new in zip(*map(cached, drivers), strict=True):
        assert torch.equal(old == 0, new == 0)
        torch.testing.assert_close(old, new, atol=0.05, rtol=0.05)


def repeated(work: Work) -> Work:
    """In place of a capture: what is replayed is done again, over the same tensors."""
    return work


def capture_mixed(runner: ModelRunner, largest: int, capture: Capture = repeated) -> MixedGraphs:
    backend = TritonAttention(CPU)
    runner.decoder.attention = Attention(backend, backend)
    graphs = MixedGraphs(runner.decoder, runner.kv, runner.tables, largest, capture)
    runner.graphs = [graphs]
    return graphs


def test_decodes_of_which_one_is_far_longer_have_a_graph_that_shares_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(cuda_graphs, "SHARED_PAIRS", 3)
    monkeypatch.setattr(interface, "EVEN_PAIRS", 3)
    spec = SPECS["qwen3"]
    weights = dummy_weights(spec, torch.float32, CPU)
    plain, other = Driver(spec, weights), Driver(spec, weights)
    other.decoder.attention = Attention(TorchAttention(), TritonAttention(CPU))
    replays = []

    def capture(work: Work) -> Work:
        return lambda: replays.append((work, work()))

    other.runner.graphs = [DecodeGraphs(other.decoder, other.runner.kv, other.runner.tables, 4, 256, capture)]
    sampled = [
        [
            driver.step(chunks={0: [7, 3], 1: [3, 9, 1], 2: [*range(1, 18)]}),
            driver.step(decode=[0, 1]),  # 2 KV heads: 10 tokens, of 3 in the longest
            driver.step(decode=[2, 0, 1]),  # 48, of 18
            driver.step(decode=[2]),  # fewer pairs than are ever shared out
            driver.step(decode=[2, 1]),  # 48, of 20
            driver.step(decode=[0, 1]),
        ]
        for driver in (plain, other)
    ]
    assert sampled[0] == sampled[1]
    steps = [work.args[0] for work, _ in replays if isinstance(work, partial)]
    assert [(len(step.rows.kv_lens), step.rows.even) for step in steps] == [
        (2, True), (4, False), (1, True), (4, False), (2, True),
    ]  # fmt: skip


class PlansFirst(PlannedAttention):
    """Attention whose first run cannot be captured, as FlashInfer's."""

    def __init__(self, step: PlannedAttention, capturing: list[bool]) -> None:
        self.step, self.capturing, self.planned = step, capturing, False

    def run(self, q: torch.Tensor, layer: int, window: int) -> torch.Tensor:
        assert self.planned or not self.capturing
        self.planned = True
        return self.step.run(q, layer, window)


class PlansFirstBackend(TorchAttention):
    def __init__(self, capturing: list[bool]) -> None:
        self.capturing = capturing

    def graph_decode(self, rows: DeviceBatch, kv: KVCache) -> GraphDecode:
        step = TritonAttention(CPU).step(rows, kv, decode=True)
        return GraphDecode(PlansFirst(step, self.capturing), lambda kv_lens: None)


def test_what_steps_share_is_there_before_a_capture() -> None:
    spec = SPECS["qwen3"]
    runner = Driver(spec, dummy_weights(spec, torch.float32, CPU)).runner
    shared, capturing = TritonAttention(CPU), list[bool]()

    def capture(work: Work) -> Work:
        capturing.append(True)
        before = list(shared.workspaces._counters)
        work()
        assert shared.workspaces._counters == before
        capturing.clear()
        return work

    for backend in (shared, PlansFirstBackend(capturing)):
        runner.decoder.attention = Attention(TorchAttention(), backend)
        assert list(DecodeGraphs(runner.decoder, runner.kv, runner.tables, 4, 256, capture).steps) == [4, 2, 1]
    assert len(shared.workspaces._counters) == 1


def test_capturing_writes_to_scratch_alone() -> None:
    spec = SPECS["mistral"]
    runner = Driver(spec, dummy_weights(spec, torch.float32, CPU)).runner
    capture_mixed(runner, 40)
    scratch = runner.kv.num_pages
    assert bool((runner.tables.page_table == scratch).all())
    assert not runner.tables.length.any()
    assert not runner.kv.k[:, :scratch].any()
    assert not runner.kv.v[:, :scratch].any()


def mixed_requests(vocab: int) -> list[Request]:
    """Half greedy, half sampled; half share a prefix; some change their logits or want log-probabilities."""
    shared, rng = list(range(1, 41)), np.random.default_rng(0)
    requests = []
    for i in range(16):
        own = rng.integers(0, vocab, 1 + 5 * i % 23).tolist()
        params = SamplingParams(
            temperature=0.8 * (i % 2), top_p=(1.0, 0.9, 1.0)[i % 3], top_k=(0, 0, 20)[i % 3], seed=i,
            max_tokens=3 + i % 7, ignore_eos=True, presence_penalty=0.5 * (i % 5 == 0),
            prompt_logprobs=1 if i == 7 else None,
        )  # fmt: skip
        requests.append(Request.make(str(i), (shared if i % 4 < 2 else []) + own, params))
    return requests


@pytest.mark.parametrize(("model", "chunk"), [("qwen3", 7), ("qwen3", 64), ("mistral", 7), ("qwen3-moe", 7)])
def test_an_engine_answers_the_same_with_whole_steps_captured(model: str, chunk: int) -> None:
    torch.set_num_threads(1)
    spec = SPECS[model]
    weights = dummy_weights(spec, torch.float32, CPU)
    config = gpu_config(
        device="cpu", dtype="float32", attn="torch", cuda_graph_max_bs=0, piecewise_cuda_graph_max_tokens=0,
        page_size=4, num_pages=96, max_prefill_length=chunk, max_running_requests=5,
    )  # fmt: skip
    built = [build(spec, weights, config, 96) for _ in range(2)]
    runner = built[1].runner
    graphs = capture_mixed(runner, 32)
    decodes = DecodeGraphs(runner.decoder, runner.kv, runner.tables, 3, 96, repeated)
    runner.graphs.append(decodes)
    answers = [each.answer(mixed_requests(spec.vocab_size), retractions=4) for each in built]
    assert answers[0] == answers[1]
    for kind, prompts in ((graphs, True), (decodes, False)):
        taken = [kind.takes(plan) for plan in built[1].executor.plans if (len(plan.prefill_slots) > 0) == prompts]
        assert any(taken)
        assert not all(taken)  # log-probabilities of a prompt, or too many tokens or rows


def test_rows_before_chunks_are_merged_and_those_behind_are_zero(device: torch.device) -> None:
    ones, out = torch.randn(6, 3, 8, device=device), torch.randn(9, 3, 8, device=device)
    before, out[7:] = out.clone(), torch.nan
    merge_rows(ones, out, torch.tensor([4, 5, 7, 7], dtype=torch.int32, device=device))
    assert torch.equal(out[:4], ones[:4])
    assert torch.equal(out[4:7], before[4:7])
    assert not out[7:].any()
