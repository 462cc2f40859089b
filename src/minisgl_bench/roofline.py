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
from minisgl.core.weights import held_elements
from minisgl.errors import ConfigError
from minisgl_bench.gpu_timing import times
from minisgl_bench.workload import PeakRates, Workload

SHARED: Final = ("qkv", "o", "gate_up", "down", "router")  # matrices that every token goes through
EXPERTS: Final = ("expert_gate_up", "expert_down")
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
    """Weights in matrices: those that every token goes through, the output head, and all experts'."""

    shared: int
    head: int
    experts: int
    share: float  # of the experts, for each token

    @classmethod
    def of(cls, spec: ModelSpec) -> "Matrices":
        shared, experts = held_elements(spec, None, SHARED), held_elements(spec, None, EXPERTS)
        share = 0.0 if spec.moe is None else spec.moe.top_k / spec.moe.num_experts
        return cls(shared, spec.vocab_size * spec.hidden_size, experts, share)

    @property
    def active(self) -> float:
        return self.shared + self.experts * self.share

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights that a step of so many rows reads: of the experts as many as evenly spread choices would meet."""
        return self.shared + self.head + self.experts * (1 - (1 - self.share) ** rows.astype(np.float64))


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
    spec: ModelSpec, workload: Workload, running: int, itemsize: int, peak: PeakRates, fp8: bool = False,
    kv_itemsize: int = 0,
) -> Roofline:  # fmt: skip
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
