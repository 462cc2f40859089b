"""The offline workload: random prompts of random lengths, answers of random lengths, all from one seed."""

import argparse
import dataclasses
import random
from dataclasses import dataclass
from typing import Final

from minisgl.core.types import SamplingParams

# Prompts are made of ids 0 … HIGHEST_TOKEN, so that the same workload suits every vocabulary.
HIGHEST_TOKEN: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class PeakRates:
    """What a GPU reaches at most: bytes/s of reading, flop/s of a large GEMM, bytes/s of copying if measured."""

    read: float
    flops: float
    copy: float | None = None


@dataclass(frozen=True, kw_only=True)
class WorkloadSpec:
    """A length range is inclusive at both ends. The defaults are the published workload."""

    num_requests: int = 256
    input_len: tuple[int, int] = (100, 1024)
    output_len: tuple[int, int] = (100, 1024)
    seed: int = 0
    temperature: float = 0.6


# A CPU's default takes half a minute instead of half an hour.
CPU_SPEC: Final = WorkloadSpec(num_requests=16, input_len=(32, 128), output_len=(32, 128))


def workload_spec(options: argparse.Namespace, gpu: bool) -> WorkloadSpec:
    names = [field.name for field in dataclasses.fields(WorkloadSpec)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return dataclasses.replace(WorkloadSpec() if gpu else CPU_SPEC, **given)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts as token ids, and for each how to answer it: EOS ignored, so every length is known beforehand."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_lens(self) -> list[int]:
        return [params.max_tokens or 0 for params in self.params]


def random_tokens(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(0, min(HIGHEST_TOKEN, vocab_size - 1)) for _ in range(length)] for length in lengths]


def make_workload(spec: WorkloadSpec, vocab_size: int) -> Workload:
    """Per prompt its length, then its tokens; after all prompts the output lengths.

    The order is that of nano-vllm's published benchmark. With it the default spec has 142,827 tokens in and
    133,966 out, and figures can be compared across engines. Each request is sampled with a seed of its own.
    """
    rng = random.Random(spec.seed)
    highest = min(HIGHEST_TOKEN, vocab_size - 1)
    prompts = [[rng.randint(0, highest) for _ in range(rng.randint(*spec.input_len))] for _ in range(spec.num_requests)]
    lengths = [rng.randint(*spec.output_len) for _ in prompts]
    return Workload(prompts=prompts, params=sampling_params(lengths, spec.temperature))


def sampling_params(lengths: list[int], temperature: float = 0.6) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, seed=index)
        for index, length in enumerate(lengths)
    ]


def redraw(workload: Workload, vocab_size: int, seed: int, most: int | None = None) -> Workload:
    """The same lengths with other tokens, which no cache knows; answers of at most `most` tokens."""
    prompts = random_tokens([len(prompt) for prompt in workload.prompts], vocab_size, seed)
    lengths = [length if most is None else min(length, most) for length in workload.output_lens]
    return Workload(prompts=prompts, params=sampling_params(lengths, workload.params[0].temperature))
