"""The least time a workload can take on a GPU: its bytes and its flops at the GPU's peak rates, one after the other.

The roofline (Williams et al., CACM 2009) of each step: a decode step reads the weights or multiplies by them, whichever
takes longer, and reads all running requests' keys and values; a prompt costs its flops. All else is free.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from minisgl.core.model_config import ModelSpec
from minisgl.errors import ConfigError
from minisgl_bench.gpu_timing import times
from minisgl_bench.workload import PeakRates, Workload

SIDE: Final = 8192
BEYOND_L2, LARGEST, ROW = 256 * 2**20, 2 * 2**30, 2**16


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of the three parts, which add up, and the work behind them."""

    prefill_seconds: float
    kv_seconds: float
    gemm_seconds: float
    prefill_flops: float
    kv_bytes: float
    decode_steps: int
    output_tokens: int

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.kv_seconds + self.gemm_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(frozen=True)
class Matrices:
    """Weights in matrices: those that every token goes through, the output head, and those of one expert."""

    shared: int
    head: int
    expert: int = 0
    sparse_layers: int = 0
    num_experts: int = 1
    top_k: int = 0

    @classmethod
    def of(cls, spec: ModelSpec) -> "Matrices":
        moe, hidden, head = spec.moe, spec.hidden_size, spec.vocab_size * spec.hidden_size
        sparse = sum(moe.layers) if moe is not None else 0
        attention = spec.num_layers * hidden * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
        shared = attention + (spec.num_layers - sparse) * 3 * hidden * spec.intermediate_size
        if moe is None:
            return cls(shared, head)
        router = sparse * hidden * moe.num_experts
        return cls(shared + router, head, 3 * hidden * moe.width, sparse, moe.num_experts, moe.top_k)

    @property
    def active(self) -> int:
        return self.shared + self.sparse_layers * self.top_k * self.expert

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights that a step of so many rows reads: of the experts as many as evenly spread choices would meet."""
        met = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** rows.astype(np.float64))
        return self.shared + self.head + self.sparse_layers * self.expert * met


def decode_batches(outputs: Sequence[int], running: int) -> NDArray[np.int64]:
    """Rows in each decode step when at most `running` requests, first come first served, take a step a token."""
    ends: list[int] = []
    changes: list[tuple[int, int]] = []
    for count in outputs:
        start = heapq.heappop(ends) if len(ends) == running else 0
        end = start + count - 1  # the first token comes from the prefill
        heapq.heappush(ends, end)
        changes += [(start, 1), (end, -1)]
    steps = np.zeros(max(ends, default=0) + 1, np.int64)
    for step, change in changes:
        steps[step] += change
    return np.cumsum(steps)[:-1]


def visible(lengths: NDArray[np.int64], windows: Sequence[int]) -> int:
    """Over all layers the cached tokens that queries at these lengths, themselves included, attend to."""
    return sum(int((np.minimum(lengths, window) if window else lengths).sum()) for window in windows)


def roofline(
    spec: ModelSpec,
    workload: Workload,
    running: int,
    itemsize: int,
    peak: PeakRates,
    fp8: bool = False,
    kv_itemsize: int = 0,
) -> Roofline:
    """The least time of a workload without shared prefixes, `running` requests at a time, `itemsize` bytes a weight.

    With `fp8` the layers' matrices have one byte and twice the flops. `kv_itemsize` is of the cache, if another.
    """
    inputs, outputs = [len(prompt) for prompt in workload.prompts], workload.output_lens
    matrices = Matrices.of(spec)
    prompt_lengths = np.concatenate([np.arange(1, n + 1) for n in inputs])
    decode_lengths = np.concatenate([np.arange(n + 1, n + m) for n, m in zip(inputs, outputs, strict=True)])
    kv_bytes = 2 * spec.num_kv_heads * spec.head_dim * (kv_itemsize or itemsize) * visible(decode_lengths, spec.windows)
    saved = matrices.active / 2 if fp8 else 0.0  # in bfloat16's flops
    prefill_flops = 2 * (matrices.active - saved) * sum(inputs) + 2 * matrices.head * len(inputs)
    # scores and their sum over values, 2 flops each
    prefill_flops += 4 * spec.num_heads * spec.head_dim * visible(prompt_lengths, spec.windows)
    rows = decode_batches(outputs, running)
    reading = ((matrices.read(rows) - matrices.head) * (1 if fp8 else itemsize) + matrices.head * itemsize) / peak.read
    computing = 2.0 * (matrices.active - saved + matrices.head) * rows / peak.flops
    return Roofline(
        prefill_seconds=prefill_flops / peak.flops,
        kv_seconds=kv_bytes / peak.read,
        gemm_seconds=float(np.maximum(reading, computing).sum()),
        prefill_flops=prefill_flops,
        kv_bytes=kv_bytes,
        decode_steps=len(rows),
        output_tokens=sum(outputs),
    )


def measure_peak_rates(device: torch.device, dtype: torch.dtype) -> PeakRates:
    """What the GPU reaches in reading, copying and a large GEMM. Raises ConfigError when no memory is left for it."""
    free = torch.cuda.mem_get_info(device)[0]
    size = min(LARGEST, free // 4 // (4 * ROW) * (4 * ROW))
    if size < BEYOND_L2:
        raise ConfigError(f"{free / 2**30:.2f} GiB are free, too little to measure the GPU; give --peak-rates")
    try:
        source = torch.ones(size // 4, dtype=torch.float32, device=device)
        rows = source.view(-1, ROW)
        a, b = (torch.randn((SIDE, SIDE), device=device).to(dtype) for _ in range(2))
        copy = 2 * size / min(times(partial(torch.empty_like(source).copy_, source), 20))
        read = size / min(times(partial(torch.sum, rows, 1), 20) + times(partial(torch.amax, rows, 1), 20))
        return PeakRates(read=max(read, copy), flops=2 * SIDE**3 / min(times(partial(torch.mm, a, b), 20)), copy=copy)
    finally:
        torch.cuda.empty_cache()
