"""The offline workload: random prompts of random lengths, answers of random lengths, all from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import msgspec

from minisgl.core.types import SamplingParams

HIGHEST_TOKEN: Final = 10_000
"""Prompts are made of ids 0 … HIGHEST_TOKEN, so that the same workload suits every vocabulary."""


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """What to draw; a length range is inclusive at both ends. The defaults are the published workload."""

    num_requests: int = 256
    input_len: tuple[int, int] = (100, 1024)
    output_len: tuple[int, int] = (100, 1024)
    seed: int = 0
    temperature: float = 0.6


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts as token ids, and for each how to answer it: EOS ignored, so every length is known beforehand."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @property
    def input_tokens(self) -> int:
        """Tokens in all prompts."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def output_tokens(self) -> int:
        """Tokens that will be generated."""
        return sum(params.max_tokens or 0 for params in self.params)


def make_workload(spec: WorkloadSpec, vocab_size: int) -> Workload:
    """Draw the workload: per prompt its length, then its tokens; after all prompts the output lengths.

    The order is that of nano-vllm's published benchmark. With it the default spec has 142,827 tokens in and
    133,966 out, and figures can be compared across engines. Each request is sampled with a seed of its own.
    """
    draw = random.Random(spec.seed)
    highest = min(HIGHEST_TOKEN, vocab_size - 1)
    prompts = []
    for _ in range(spec.num_requests):
        length = draw.randint(*spec.input_len)
        prompts.append([draw.randint(0, highest) for _ in range(length)])
    params = [
        SamplingParams(
            temperature=spec.temperature, max_tokens=draw.randint(*spec.output_len), ignore_eos=True, seed=index
        )
        for index in range(spec.num_requests)
    ]
    return Workload(prompts=prompts, params=params)


def redraw(workload: Workload, vocab_size: int, seed: int) -> Workload:
    """The same lengths with other tokens, which no cache knows."""
    draw = random.Random(seed)
    highest = min(HIGHEST_TOKEN, vocab_size - 1)
    prompts = [[draw.randint(0, highest) for _ in prompt] for prompt in workload.prompts]
    return Workload(prompts=prompts, params=workload.params)


def shorten(workload: Workload, max_tokens: int) -> Workload:
    """The same prompts with answers of at most `max_tokens`."""
    limits = [min(params.max_tokens or max_tokens, max_tokens) for params in workload.params]
    params = [msgspec.structs.replace(p, max_tokens=limit) for p, limit in zip(workload.params, limits, strict=True)]
    return Workload(prompts=workload.prompts, params=params)
