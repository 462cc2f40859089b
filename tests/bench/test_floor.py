"""The floor of a workload: known models, known totals, and the schedule it assumes."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from minisgl.bench.ceilings import Ceilings, parse_ceilings
from minisgl.bench.floor import Matrices, decode_batches, floor
from minisgl.bench.workload import Workload, WorkloadSpec, make_workload
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.types import SamplingParams

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
H200 = Ceilings(read=4.29e12, flops=790e12)


def spec_of(name: str) -> ModelSpec:
    return read_spec(MODELS / name)


@pytest.mark.parametrize(("model", "rate"), [("Qwen3-0.6B", 36_014), ("Qwen3-14B", 8_064)])
def test_published_workload_has_the_published_floor(model: str, rate: float) -> None:
    least = floor(spec_of(model), make_workload(WorkloadSpec(), 151_936), 256, 2, H200)
    assert least.tokens_per_second == pytest.approx(rate, rel=0.005)
    assert least.decode_steps == 1023
    assert least.figures()["seconds"] == pytest.approx(133_966 / rate, rel=0.005)


def test_matrices_are_counted_as_the_model_cards_count_them() -> None:
    dense, sparse = Matrices.of(spec_of("Qwen3-14B")), Matrices.of(spec_of("Qwen3-30B-A3B"))
    assert dense.shared + dense.head == pytest.approx(14.8e9 - 151_936 * 5120, rel=0.01)
    assert sparse.active + 2 * sparse.head == pytest.approx(3.3e9, rel=0.02)
    assert sparse.shared + 2 * sparse.head + 48 * 128 * sparse.expert == pytest.approx(30.5e9, rel=0.01)


def test_a_batch_reads_the_experts_that_its_tokens_meet() -> None:
    sparse = Matrices.of(spec_of("Qwen3-30B-A3B"))
    one, many = sparse.read(np.array([1, 100_000]))
    assert one == pytest.approx(sparse.active + sparse.head)
    assert many == pytest.approx(sparse.shared + sparse.head + 48 * 128 * sparse.expert)


def test_requests_decode_together_up_to_the_limit() -> None:
    assert decode_batches([3, 1, 2, 4], running=4).tolist() == [3, 2, 1]
    assert decode_batches([3, 1, 2, 4], running=2).tolist() == [2, 2, 1, 1]
    assert decode_batches([1], running=1).tolist() == []


def one_request(tokens_in: int, tokens_out: int) -> Workload:
    return Workload(prompts=[[0] * tokens_in], params=[SamplingParams(max_tokens=tokens_out)])


def test_one_request_by_hand() -> None:
    spec = spec_of("Qwen3-0.6B")
    least = floor(spec, one_request(10, 3), 256, 2, H200)
    matrices = Matrices.of(spec)
    kv_token = 2 * 28 * 8 * 128 * 2
    assert least.kv_bytes == kv_token * (11 + 12)
    assert least.product_seconds == pytest.approx(2 * 2 * (matrices.active + matrices.head) / 4.29e12)
    attention = 4 * 16 * 128 * 28 * 55
    assert least.prefill_flops == 2 * matrices.active * 10 + 2 * matrices.head + attention


def test_a_window_bounds_what_is_read() -> None:
    spec = spec_of("Qwen3-0.6B")
    narrow = dataclasses.replace(spec, windows=(4,) * spec.num_layers)
    assert floor(narrow, one_request(10, 3), 256, 2, H200).kv_bytes == 2 * 28 * 8 * 128 * 2 * (4 + 4)


def test_ceilings_are_read_from_a_flag() -> None:
    assert parse_ceilings("read=4.45e12,flops=790e12") == Ceilings(read=4.45e12, flops=790e12)
    for text in ("read=1", "read=1,flops=0", "read=1,flops=x", "read=1,flops=nan", "read=1,flops=2,copy=3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not read="):
            parse_ceilings(text)
