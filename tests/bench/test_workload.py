"""The offline workload is the published one, and a function of its seed."""

from __future__ import annotations

import dataclasses

import pytest

from minisgl_bench.workload import HIGHEST_TOKEN, WorkloadSpec, make_workload, redraw


def test_default_workload_has_the_published_token_counts() -> None:
    workload = make_workload(WorkloadSpec(), vocab_size=151_936)
    assert len(workload.prompts) == len(workload.params) == 256
    assert (workload.input_tokens, sum(workload.output_lens)) == (142_827, 133_966)


@pytest.mark.parametrize("vocab_size", [2, 500, 151_936])
def test_lengths_and_tokens_stay_in_their_ranges(vocab_size: int) -> None:
    spec = WorkloadSpec(num_requests=40, input_len=(3, 9), output_len=(2, 2), seed=5)
    workload = make_workload(spec, vocab_size)
    assert {len(prompt) for prompt in workload.prompts} == set(range(3, 10))
    assert {params.max_tokens for params in workload.params} == {2}
    assert min(map(min, workload.prompts)) >= 0
    assert max(map(max, workload.prompts)) < min(vocab_size, HIGHEST_TOKEN + 1)


def test_requests_ignore_eos_and_carry_seeds_of_their_own() -> None:
    workload = make_workload(WorkloadSpec(num_requests=4, temperature=0.25), vocab_size=100)
    assert all(params.ignore_eos and params.temperature == 0.25 for params in workload.params)
    assert [params.seed for params in workload.params] == [0, 1, 2, 3]


def test_the_seed_decides_the_workload() -> None:
    spec = WorkloadSpec(num_requests=3)
    first, again = make_workload(spec, 1000), make_workload(spec, 1000)
    other = make_workload(dataclasses.replace(spec, seed=1), 1000)
    assert first == again
    assert first.prompts != other.prompts


def test_other_tokens_and_shorter_answers_keep_the_prompt_lengths() -> None:
    first = make_workload(WorkloadSpec(num_requests=5, input_len=(20, 30), output_len=(2, 9)), 1000)
    other = redraw(first, 1000, seed=9, most=4)
    assert [len(prompt) for prompt in other.prompts] == [len(prompt) for prompt in first.prompts]
    assert not [1 for a, b in zip(first.prompts, other.prompts, strict=True) if a == b]
    limits = [(a.max_tokens or 0, b.max_tokens) for a, b in zip(first.params, other.params, strict=True)]
    assert all(short == min(full, 4) for full, short in limits)
    assert [params.seed for params in other.params] == [params.seed for params in first.params]
