"""What the benchmarks of single kernels share: noise, shapes, times inside a CUDA graph, lines of figures."""

import itertools
import statistics
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from minisgl.errors import ConfigError

CUDA: Final = torch.device("cuda")
DTYPE: Final = torch.bfloat16
HEAD_DIM: Final = 128
VOCAB: Final = 151_936


def noise(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=DTYPE).mul_(scale)


def times(run: Callable[[], object], count: int) -> list[float]:
    """Seconds of calls on the GPU, after two to warm up."""
    run()
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def graph_us(run: Callable[[], object], calls: int = 20, replays: int = 30) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    return 1e6 * statistics.median(times(graph.replay, replays)) / calls


def print_heading() -> None:
    """Print what stands above the lines of `print_figure`. Raises ConfigError without a GPU."""
    if not torch.cuda.is_available():
        raise ConfigError("this benchmark needs a GPU")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
    print(f"{'kernel':<22} {'shape':<21} {'tokens':>7} {'µs':>9} {'GB/s':>6} {'TF/s':>5}")


def print_figure(kernel: str, shape: str, tokens: int, us: float, moved: float, flops: float = 0) -> None:
    rates = f"{moved / us / 1e3:>6.0f} {flops / us / 1e6:>5.0f}"
    print(f"{kernel:<22} {shape:<21} {tokens:>7} {us:>9.1f} {rates}", flush=True)
