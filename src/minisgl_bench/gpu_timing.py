"""What the benchmarks of single kernels share: noise, shapes, sampling tables, and times inside a CUDA graph."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from minisgl.errors import ConfigError
from minisgl.ops.sampling import SamplingRows

CUDA: Final = torch.device("cuda")
DTYPE: Final = torch.bfloat16
HEAD_DIM: Final = 128
VOCAB: Final = 151_936
MODELS: Final = {
    "0.6B": (1024, 16, 8, 3072), "8B": (4096, 32, 8, 14336), "14B": (5120, 40, 8, 17408), "32B": (5120, 64, 8, 25600),
}  # fmt: skip
"""Of Qwen3: hidden size, heads, KV heads, MLP width."""


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark needs a GPU")


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal noise on the GPU, bf16."""
    return torch.randn(*shape, device=CUDA, dtype=DTYPE).mul_(scale)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, or the share of tokens that differ; infinite where a value is not finite."""
    if found.dtype == torch.int32:
        return float((found != expected).float().mean())
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error < float("inf") else float("inf")


def sampling_rows(rows: int, device: torch.device, seeds: Tensor, **values: float) -> SamplingRows:
    """A table whose rows all have these parameters."""
    return SamplingRows(
        temperature=torch.full((rows,), values["temperature"], device=device),
        top_p=torch.full((rows,), values.get("top_p", 1.0), device=device),
        min_p=torch.full((rows,), values.get("min_p", 0.0), device=device),
        top_k=torch.full((rows,), int(values.get("top_k", 0)), dtype=torch.int32, device=device),
        seed=seeds.to(device),
        min_len=torch.zeros(rows, dtype=torch.int32, device=device),
        stop_ids=torch.full((rows, 32), -1, dtype=torch.int32, device=device),
    )


def microseconds(run: Callable[[], object], replays: int = 30, warm: int = 3) -> float:
    """Median time of a call on the GPU, after some to warm up."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + warm + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return 1e3 * statistics.median(times[warm:])


def graph_microseconds(run: Callable[[], object], calls: int = 20, replays: int = 30) -> float:
    """Median time of a call inside a CUDA graph of so many."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    return microseconds(graph.replay, replays) / calls
