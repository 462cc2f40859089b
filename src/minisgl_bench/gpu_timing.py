"""What the benchmarks of single kernels share: noise, shapes, sampling tables, and times inside a CUDA graph."""

import itertools
import statistics
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from minisgl.core.sampler import SamplingRows
from minisgl.errors import ConfigError

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
    return torch.randn(*shape, device=CUDA, dtype=DTYPE).mul_(scale)


def sampling_rows(rows: int, device: torch.device, seeds: Tensor, **values: float) -> SamplingRows:
    return SamplingRows(
        temperature=torch.full((rows,), values["temperature"], device=device),
        top_p=torch.full((rows,), values.get("top_p", 1.0), device=device),
        min_p=torch.full((rows,), values.get("min_p", 0.0), device=device),
        top_k=torch.full((rows,), int(values.get("top_k", 0)), dtype=torch.int32, device=device),
        seed=seeds.to(device),
        min_len=torch.zeros(rows, dtype=torch.int32, device=device),
        stop_ids=torch.full((rows, 32), -1, dtype=torch.int32, device=device),
    )


def times(run: Callable[[], object], count: int, warm: int = 2) -> list[float]:
    """Seconds of calls on the GPU, after some to warm up."""
    for _ in range(warm):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def median_us(run: Callable[[], object], count: int = 30) -> float:
    return 1e6 * statistics.median(times(run, count))


def graph_us(run: Callable[[], object], calls: int = 20, replays: int = 30) -> float:
    """Median microseconds of a call inside a CUDA graph of so many."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    return median_us(graph.replay, replays) / calls
