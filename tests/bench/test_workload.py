"""The offline workload is the published one and a function of its seed; its roofline, for known models and totals."""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from minisgl.core.model_config import ModelSpec, read_spec
from minisgl_bench.command import peak_rates
from minisgl_bench.roofline import Matrices, decode_batches, roofline
from minisgl_bench.workload import PeakRates, Workload, WorkloadSpec, make_workload, redraw, sampling_params

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
H200 = PeakRates(read=4.29e12, flops=790e12)


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
    assert max(map(max, workload.prompts)) < min(vocab_size, 10_001)


def test_requests_ignore_eos_and_are_a_function_of_the_seed() -> None:
    spec = WorkloadSpec(num_requests=4, temperature=0.25)
    workload = make_workload(spec, vocab_size=100)
    assert workload == make_workload(spec, vocab_size=100)
    assert workload.prompts != make_workload(dataclasses.replace(spec, seed=1), vocab_size=100).prompts
    assert all(params.ignore_eos and params.temperature == 0.25 for params in workload.params)
    assert [params.seed for params in workload.params] == [0, 1, 2, 3]


def test_other_tokens_and_shorter_answers_keep_the_prompt_lengths() -> None:
    first = make_workload(WorkloadSpec(num_requests=5, input_len=(20, 30), output_len=(2, 9)), 1000)
    other = redraw(first, 1000, seed=9, most=4)
    assert [len(prompt) for prompt in other.prompts] == [len(prompt) for prompt in first.prompts]
    assert not [1 for a, b in zip(first.prompts, other.prompts, strict=True) if a == b]
    limits = [(a.max_tokens or 0, b.max_tokens) for a, b in zip(first.params, other.params, strict=True)]
    assert all(short == min(full, 4) for full, short in limits)
    assert [params.seed for params in other.params] == [params.seed for params in first.params]


def spec_of(name: str) -> ModelSpec:
    return read_spec(MODELS / name)


@pytest.mark.parametrize(("model", "rate"), [("Qwen3-0.6B", 36_014), ("Qwen3-14B", 8_064)])
def test_published_workload_has_the_published_roofline(model: str, rate: float) -> None:
    least = roofline(spec_of(model), make_workload(WorkloadSpec(), 151_936), 256, 2, H200)
    assert least.tokens_per_second == pytest.approx(rate, rel=0.005)
    assert least.decode_steps == 1023
    assert least.seconds == pytest.approx(133_966 / rate, rel=0.005)


def test_matrices_are_counted_as_the_model_cards_count_them() -> None:
    dense, sparse = Matrices.of(spec_of("Qwen3-14B")), Matrices.of(spec_of("Qwen3-30B-A3B"))
    assert dense.shared + dense.head == pytest.approx(14.8e9 - 151_936 * 5120, rel=0.01)
    assert sparse.active + 2 * sparse.head == pytest.approx(3.3e9, rel=0.02)
    assert sparse.shared + 2 * sparse.head + sparse.experts == pytest.approx(30.5e9, rel=0.01)


def test_a_batch_reads_the_experts_that_its_tokens_meet() -> None:
    sparse = Matrices.of(spec_of("Qwen3-30B-A3B"))
    one, many = sparse.read(np.array([1, 100_000]))
    assert one == pytest.approx(sparse.active + sparse.head)
    assert many == pytest.approx(sparse.shared + sparse.head + sparse.experts)


def test_requests_decode_together_up_to_the_limit() -> None:
    assert decode_batches([3, 1, 2, 4], running=4).tolist() == [3, 2, 1]
    assert decode_batches([3, 1, 2, 4], running=2).tolist() == [2, 2, 1, 1]
    assert decode_batches([1], running=1).tolist() == []


def one_request(tokens_in: int, tokens_out: int) -> Workload:
    return Workload(prompts=[[0] * tokens_in], params=sampling_params([tokens_out]))


def test_one_request_by_hand() -> None:
    spec = spec_of("Qwen3-0.6B")
    least = roofline(spec, one_request(10, 3), 256, 2, H200)
    matrices = Matrices.of(spec)
    kv_token = 2 * 28 * 8 * 128 * 2
    assert least.kv_bytes == kv_token * (11 + 12)
    assert least.gemm_seconds == pytest.approx(2 * 2 * (matrices.active + matrices.head) / 4.29e12)
    attention = 4 * 16 * 128 * 28 * 55
    assert least.prefill_flops == 2 * matrices.active * 10 + 2 * matrices.head + attention


def test_a_window_bounds_what_is_read() -> None:
    spec = spec_of("Qwen3-0.6B")
    narrow = dataclasses.replace(spec, windows=(4,) * spec.num_layers)
    assert roofline(narrow, one_request(10, 3), 256, 2, H200).kv_bytes == 2 * 28 * 8 * 128 * 2 * (4 + 4)


def test_peak_rates_are_read_from_a_flag() -> None:
    assert peak_rates("read=4.45e12,flops=790e12") == PeakRates(read=4.45e12, flops=790e12)
    for text in ("read=1", "read=1,flops=0", "read=1,flops=x", "read=1,flops=nan", "read=1,flops=2,copy=3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not read="):
            peak_rates(text)
