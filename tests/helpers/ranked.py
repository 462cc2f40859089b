"""What tests of groups run on every rank: small models, mixed requests, and an engine over any executor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.constraints import Cycle
from helpers.models import tiny_spec
from helpers.retract import events_of
from helpers.special import Answer
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.model_config import ModelSpec, Moe
from minisgl.core.plan import Executor
from minisgl.core.types import ModelInfo, Request, SamplingParams

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


def requests(spec: ModelSpec, count: int) -> list[Request]:
    """Greedy and sampled, filtered in every way, half with a common prefix, some that stop on EOS."""
    rng = np.random.default_rng(1)
    shared = rng.integers(0, spec.vocab_size, 20).tolist()
    made = []
    for i in range(count):
        own = rng.integers(0, spec.vocab_size, rng.integers(1, 20)).tolist()
        params = SamplingParams(
            temperature=(0.0, 0.8, 1.5)[i % 3],
            top_p=(1.0, 0.9, 0.5)[i % 4 % 3],
            top_k=(0, 0, 20, 3)[i % 7 % 4],
            min_p=(0.0, 0.05)[i % 5 == 4],
            seed=i,
            min_tokens=3 if i % 6 == 0 else 0,
            max_tokens=4 + i % 5,
            ignore_eos=i % 4 != 0,
        )
        made.append(Request(id=str(i), prompt=(shared if i % 2 else []) + own, params=params))
    return made


def generate(
    executor: Executor,
    spec: ModelSpec,
    settings: Config,
    retractions: int = 0,
    asked: Sequence[Request] = (),
    count: int = 50,
) -> list[Answer]:
    """Every request's answer; every fifth step one is retracted, up to `retractions` times."""
    asked = asked or requests(spec, count)
    model = ModelInfo(
        name="tiny", vocab_size=spec.vocab_size, max_seq_len=MAX_SEQ_LEN, eos_token_ids=spec.eos_token_ids
    )
    engine = Engine(executor, model, settings, lambda grammar: Cycle(grammar, spec.vocab_size, spec.eos_token_ids[0]))
    answers = {request.id: Answer() for request in asked}
    for event in events_of(engine, asked, retractions):
        answers[event.id].take(event)
    assert engine.scheduler.retracted >= min(retractions, 4)
    engine.close()
    return list(answers.values())
