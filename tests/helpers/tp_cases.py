"""Small models, mixed requests, an engine over any executor, and tensor-parallel ranks in threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from helpers.constraints import Cycle
from helpers.models import EOS, tiny_spec
from helpers.special import Answer, answers_of
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec, Moe
from minisgl.core.plan import Executor, Masks, StepPlan, StepResult
from minisgl.core.types import ModelInfo, Request, SamplingParams
from minisgl.distributed.collectives import TPGroup
from minisgl.distributed.executor import build_rank_executor

T = TypeVar("T")

MAX_SEQ_LEN = 96
NOWHERE = Path("/nonexistent")


def moe(*sparse: bool) -> Moe:
    return Moe(num_experts=6, top_k=2, width=24, norm_topk_prob=True, layers=sparse)


SPECS = {
    "llama": tiny_spec(architecture="LlamaForCausalLM", qk_norm=False, tie_embeddings=True),
    "llama-biased": tiny_spec(
        architecture="LlamaForCausalLM", qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True
    ),
    "mistral": tiny_spec(architecture="MistralForCausalLM", qk_norm=False, windows=(24, 24)),
    "qwen2": tiny_spec(architecture="Qwen2ForCausalLM", qk_norm=False, qkv_bias=True),
    "qwen3": tiny_spec(),
    "qwen3-one-kv-head": tiny_spec(num_kv_heads=1),
    "qwen3-all-kv-heads": tiny_spec(num_kv_heads=4),
    "qwen3-moe": tiny_spec(architecture="Qwen3MoeForCausalLM", moe=moe(True, False)),
    "tiny-vocabulary": tiny_spec(vocab_size=70),
}


def config(**settings: object) -> Config:
    base = Config(
        device="cpu", dtype="float32", attn="torch,torch", cuda_graph_max_bs=0, max_running_requests=8, page_size=4,
        max_prefill_length=24, memory_ratio=0.9, num_pages=96, dummy_weight=True,
    )  # fmt: skip
    return base.replace(**settings)


def requests(vocab_size: int, count: int, longer: int = 0, shared_len: int = 20) -> list[Request]:
    """Greedy and sampled, filtered in every way, half with a common prefix, some that stop on EOS."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, vocab_size, shared_len).tolist()
    made = []
    for i in range(count):
        own = rng.integers(0, vocab_size, rng.integers(1, 20)).tolist()
        params = SamplingParams(
            temperature=(0.0, 0.8, 1.5)[i % 3], top_p=(1.0, 0.9, 0.5)[i % 4 % 3], top_k=(0, 0, 20, 3)[i % 7 % 4],
            min_p=(0.0, 0.05)[i % 5 == 4], seed=i, min_tokens=3 if i % 6 == 0 else 0,
            max_tokens=4 + i % 5 + longer, ignore_eos=i % 4 != 0,
        )  # fmt: skip
        made.append(Request.make(id=str(i), prompt=(shared if i % 2 else []) + own, params=params))
    return made


def generate(
    executor: Executor, spec: ModelSpec, settings: Config, retractions: int = 0, asked: Sequence[Request] = (),
    count: int = 50,
) -> list[Answer]:  # fmt: skip
    """Every request's answer; every fifth step one is retracted, up to `retractions` times."""
    asked = asked or requests(spec.vocab_size, count)
    model = ModelInfo(name="tiny", vocab_size=spec.vocab_size, max_seq_len=MAX_SEQ_LEN, eos_token_ids=(EOS,))
    engine = Engine(executor, model, settings, lambda grammar: Cycle(grammar, spec.vocab_size, EOS))
    answers = answers_of(engine, asked, retractions, every=5)
    assert (engine.scheduler.counts.retracted >= 4) == (retractions > 0)
    engine.close()
    return list(answers.values())


class ThreadCollectives:
    """Collectives between threads: `tensors` are the ranks' of the collective at hand."""

    def __init__(self, rank: int, tensors: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.tensors = tensors
        self.barrier = barrier

    def all_gather(self, x: Tensor) -> Tensor:
        self.tensors[self.rank] = x
        self.barrier.wait()
        found = torch.stack(self.tensors)
        self.barrier.wait()
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        total, *others = self.all_gather(x).unbind()
        for part in others:  # in the order of ranks, so that all have the same bits
            total += part
        return total

    def abort(self) -> None:
        self.barrier.abort()

    def close(self) -> None:
        pass


def thread_groups(size: int) -> list[TPGroup]:
    device, control = (([torch.empty(0)] * size, threading.Barrier(size, timeout=60)) for _ in range(2))
    return [TPGroup(r, size, ThreadCollectives(r, *device), ThreadCollectives(r, *control)) for r in range(size)]


def on_all(size: int, work: Callable[[TPGroup], T]) -> list[T]:
    def run(group: TPGroup) -> T:
        try:
            return work(group)
        except BaseException:
            group.collectives.abort()
            group.control.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(run, group) for group in thread_groups(size)]]


class ThreadGroup:
    """An executor over the ranks of a group of threads; every rank's tokens must be equal."""

    def __init__(
        self, config: Config, folder: Path, spec: ModelSpec, max_seq_len: int, size: int,
        alive: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        def build(group: TPGroup) -> LocalExecutor:
            return build_rank_executor(config, folder, spec, max_seq_len, group, alive=alive)[0]

        self.ranks: list[LocalExecutor] = on_all(size, build)

    @property
    def num_pages(self) -> int:
        return self.ranks[0].num_pages

    def launch(self, plan: StepPlan) -> None:
        for rank in self.ranks:
            rank.launch(plan)

    def finish(self, masks: Masks) -> None:
        for rank in self.ranks:
            rank.finish(masks)

    def collect(self) -> StepResult:
        results = [rank.collect() for rank in self.ranks]
        for result in results[1:]:
            assert result.tokens.tolist() == results[0].tokens.tolist()
        return results[0]

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
