"""A trace is taken apart into steps, kinds of kernels, and two kinds of idle time."""

from __future__ import annotations

from typing import Any

import pytest

from minisgl.bench.trace import Activity, activities, by_step, kind, step_times

US = 1e-6


def event(start: float, length: float, name: str, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}


def copy_back(start: float) -> dict[str, Any]:
    return event(start, 1, "Memcpy DtoH (Device -> Pinned)", "gpu_memcpy")


def copy_in(start: float) -> dict[str, Any]:
    return event(start, 1, "Memcpy HtoD (Pinned -> Device)", "gpu_memcpy")


TRACE = {
    "traceEvents": [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 500},
        copy_in(100), event(103, 10, "flash::FlashAttnFwdSm90"), event(115, 20, "nvjet_tst_128x64"), copy_back(136),
        copy_in(140), event(143, 10, "_split_kernel"), event(153, 5, "sm90_xmma_gemm_bf16"), copy_back(160),
    ]
}  # fmt: skip


def test_steps_end_with_their_copy_to_the_host() -> None:
    parts = by_step(activities(TRACE), 2)
    assert [len(part) for part in parts] == [4, 4]
    assert all(part[-1].ends_step for part in parts)
    assert [len(part) for part in by_step(activities(TRACE), 3)] == [8]
    assert by_step([], 1) == [[]]


def test_time_is_told_apart() -> None:
    first, second = step_times(by_step(activities(TRACE), 2))
    assert first.kernels == pytest.approx({"attention": 10 * US, "products": 20 * US, "other": 2 * US})
    assert first.gaps == pytest.approx(2 * US)
    assert first.between is None
    assert second.kernels == pytest.approx({"products": 5 * US, "other": 12 * US})
    assert second.gaps == pytest.approx(0.0)
    assert second.between == pytest.approx((1 + 3 + 2) * US)  # before the copy back, after it, before the first kernel
    assert second.busy == pytest.approx(17 * US)


def test_all_of_a_step_is_accounted_for() -> None:
    times = step_times(by_step(activities(TRACE), 2))
    total = sum(time.busy + time.gaps + (time.between or 0.0) for time in times)
    before_the_first_kernel, behind_the_last = 2, 2
    assert total == pytest.approx((161 - 100 - before_the_first_kernel - behind_the_last) * US)


def test_overlapping_kernels_count_once() -> None:
    trace = {"traceEvents": [event(0, 10, "gemm"), event(5, 10, "norm"), event(6, 2, "norm")]}
    (time,) = step_times(by_step(activities(trace), 1))
    assert time.kernels == pytest.approx({"products": 10 * US, "other": 5 * US})
    assert time.gaps == 0.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<>>>", "attention"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<>", "attention"),
        ("kernel_mha", "attention"),
        ("_prefill_kernel", "attention"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<>", "products"),
        ("_gate_up_kernel", "products"),
        ("_norm_kernel", "other"),
        ("_split_kernel", "other"),
    ],
)
def test_kernels_are_sorted_by_name(name: str, expected: str) -> None:
    assert kind(Activity(0.0, 1.0, "kernel", name)) == expected


def test_a_copy_is_never_a_product() -> None:
    assert kind(Activity(0.0, 1.0, "gpu_memcpy", "Memcpy HtoD (gemm)")) == "other"
