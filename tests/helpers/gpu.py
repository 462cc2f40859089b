"""Random models on the GPU: engines over them, the plain float32 reference, and what the two must agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.driver import Driver, RecordingDecoder
from helpers.models import EOS, tiny_spec
from helpers.retract import events_of
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec, Rope
from minisgl.core.model_runner import ModelRunner
from minisgl.core.plan import Masks, StepPlan
from minisgl.core.types import ModelInfo, Request, SamplingParams
from minisgl.core.weights import TORCH_DTYPES, Weights, dummy_weights
from minisgl.gpu.attention.select import available_backends, make_attention
from minisgl.gpu.executor import attention_shape, make_executor
from minisgl.gpu.operations import operations_for

DEVICE = torch.device("cuda")
SPEC = tiny_spec(
    vocab_size=1024, hidden_size=256, head_dim=128, intermediate_size=512, rope=Rope(theta=1e6),
    max_position=2**18, checkpoint_dtype="bfloat16",
)  # fmt: skip
"""Qwen3 in small: two query heads on a KV head."""


def require(pair: str) -> None:
    """Skip where a backend cannot run."""
    reasons = available_backends(DEVICE)
    for name in pair.split(","):
        if reason := reasons.get(name):
            pytest.skip(f"{name}: {reason}")


def need_gpus(count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device = DEVICE) -> Weights:
    """Noise in every tensor; norms are not all 1, and biases matter."""
    weights = dummy_weights(spec, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    for layer in weights.layers:
        for name, value in vars(layer).items():
            if value is not None and name.endswith("norm"):
                value.normal_(1.0, 0.2, generator=generator)
            elif value is not None and name.endswith("bias"):
                value.mul_(10)
    weights.norm.normal_(1.0, 0.2, generator=generator)
    return weights


def to_float32(weights: Weights) -> Weights:
    layers = []
    for layer in weights.layers:
        wide = {name: value.float() for name, value in vars(layer).items() if value is not None}
        layers.append(dataclasses.replace(layer, **wide))
    embedding = weights.embedding.float()
    assert isinstance(weights.head, torch.Tensor)
    head = embedding if weights.head is weights.embedding else weights.head.float()
    return Weights(embedding, layers, weights.norm.float(), head)


def gpu_config(**settings: object) -> Config:
    base = Config(
        device="cuda", dtype="bfloat16", attn="auto", cuda_graph_max_bs=8, max_running_requests=8,
        max_prefill_length=8192, memory_ratio=0.9, num_pages=512,
    )  # fmt: skip
    return base.replace(**settings)


class Watched(LocalExecutor):
    """Notes its plans; while `strict`, a launch that waits for the device is an error."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.plans: list[StepPlan] = []
        self.strict = False

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        with self._watch():
            super().launch(plan)

    def finish(self, masks: Masks) -> None:
        with self._watch():
            super().finish(masks)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        if not self.strict:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Built:
    engine: Engine
    executor: Watched

    @property
    def runner(self) -> ModelRunner:
        return self.executor.runner

    def answer(self, requests: Iterable[Request], retractions: int = 0) -> list[list[int]]:
        """Every request's tokens, all added at once; every fifth step one is retracted, up to `retractions` times."""
        engine, asked = self.engine, list(requests)
        tokens: dict[str, list[int]] = {request.id: [] for request in asked}
        for event in events_of(engine, asked, retractions):
            tokens[event.id] += event.tokens
        assert engine.cache.num_owned == 0
        return list(tokens.values())


def build(spec: ModelSpec, weights: Weights, config: Config, max_seq_len: int = 512) -> Built:
    executor = Watched(make_executor(spec, weights, config, max_seq_len).runner)
    fits = min(max_seq_len, executor.num_pages * config.page_size)
    model = ModelInfo(name="small", vocab_size=spec.vocab_size, max_seq_len=fits, eos_token_ids=(EOS,))
    return Built(Engine(executor, model, config), executor)


def greedy(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [Request.make(id=str(i), prompt=list(prompt), params=params) for i, prompt in enumerate(prompts)]


def random_prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths for SPEC's vocabulary."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SPEC.vocab_size, length).tolist() for length in lengths]


def reference_driver(spec: ModelSpec, exact: Weights, tokens: int, rows: int = 1) -> Driver:
    """Plain torch operations in float32 on the GPU, with room for so many tokens in all."""
    pages = -(-tokens // 16) + rows
    return Driver(spec, exact, rows=rows, page_size=16, num_pages=pages, max_seq_len=tokens, device=DEVICE)


def fused_driver(spec: ModelSpec, weights: Weights, config: Config, max_seq_len: int) -> Driver:
    """A driver that records the logits of the fused operations and the attention backends of `config`."""
    rows, num_pages = config.max_running_requests, config.num_pages
    assert rows is not None
    assert num_pages is not None
    driver = Driver(
        spec, weights, rows=rows, page_size=config.page_size, num_pages=num_pages, max_seq_len=max_seq_len,
        dtype=TORCH_DTYPES[config.dtype], device=DEVICE,
    )  # fmt: skip
    attention, _ = make_attention(config.attn, attention_shape(spec, config), DEVICE)
    ops = operations_for(DEVICE, spec.hidden_size)
    driver.decoder = RecordingDecoder(spec, weights, attention, max_seq_len, ops)
    driver.runner = ModelRunner(driver.decoder, driver.runner.kv, rows, max_seq_len, DEVICE)
    return driver


def graph_driver(spec: ModelSpec, weights: Weights, config: Config, max_seq_len: int) -> Driver:
    """A driver over the engine's own runner with its graphs; it records no logits."""
    driver = fused_driver(spec, weights, config, max_seq_len)
    driver.runner = make_executor(spec, weights, config, max_seq_len).runner
    return driver


@dataclass(frozen=True)
class Agreement:
    tokens: int
    sure: int  # where float32 leads by more than the margin
    wrong: int  # those of them that differ
    largest: float  # by how much float32 leads at most where an answer differs

    def __add__(self, other: Agreement) -> Agreement:
        tokens, sure, wrong = self.tokens + other.tokens, self.sure + other.sure, self.wrong + other.wrong
        return Agreement(tokens, sure, wrong, max(self.largest, other.largest))


def agreement(logits: Tensor, answer: Sequence[int], margin: float) -> Agreement:
    """Compare tokens with the best of float32 logits (n, V): certain where that leads the second by over `margin`."""
    best = logits.topk(2, dim=-1)
    lead = best.values[:, 0] - best.values[:, 1]
    differs = best.indices[:, 0] != torch.tensor(answer, device=logits.device)
    largest = float(lead[differs].max()) if differs.any() else 0.0
    return Agreement(len(answer), int((lead > margin).sum()), int((differs & (lead > margin)).sum()), largest)


def compare_greedy(
    spec: ModelSpec, exact: Weights, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], margin: float
) -> Agreement:
    """The agreement of all answers with the reference, each judged along its own tokens."""
    total = Agreement(0, 0, 0, 0.0)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*prompt, *answer[:-1]]
        driver = reference_driver(spec, exact, len(tokens))
        driver.step(chunks={0: tokens})
        total += agreement(driver.logits[len(prompt) - 1 :], answer, margin)
    return total
