"""The least time a workload can take on a card: its bytes and its flops at the card's ceilings, one after the other.

It is the roofline (Williams et al., CACM 2009) step by step: a decode step reads the weights once or multiplies by
them, whichever takes longer, and reads the keys and values of every running request; a prompt costs its flops. Norms,
sampling, writing keys and values, launches and the host are free.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minisgl.bench.ceilings import Ceilings
from minisgl.bench.workload import Workload
from minisgl.core.model_config import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds of the three parts, which add up, and the work behind them."""

    prefill_seconds: float
    kv_seconds: float
    product_seconds: float
    prefill_flops: float
    kv_bytes: float
    decode_steps: int
    output_tokens: int

    @property
    def seconds(self) -> float:
        """The least time."""
        return self.prefill_seconds + self.kv_seconds + self.product_seconds

    @property
    def tokens_per_second(self) -> float:
        """Output tokens/s in the least time."""
        return self.output_tokens / self.seconds

    def figures(self) -> dict[str, float]:
        """All of it for a report."""
        return {
            "output_tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            **dataclasses.asdict(self),
        }


@dataclass(frozen=True)
class Matrices:
    """Weights in matrices: those that every token goes through, the output head, and those of one expert."""

    shared: int
    head: int
    expert: int
    sparse_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Matrices:
        """Count a model's."""
        moe, hidden = spec.moe, spec.hidden_size
        attention = hidden * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
        sparse = sum(moe.layers) if moe is not None else 0
        dense = (spec.num_layers - sparse) * 3 * hidden * spec.intermediate_size
        router = sparse * hidden * moe.num_experts if moe is not None else 0
        return cls(
            shared=spec.num_layers * attention + dense + router,
            head=spec.vocab_size * hidden,
            expert=3 * hidden * moe.width if moe is not None else 0,
            sparse_layers=sparse,
            num_experts=moe.num_experts if moe is not None else 1,
            top_k=moe.top_k if moe is not None else 0,
        )

    @property
    def active(self) -> int:
        """Weights that a token is multiplied by in the layers."""
        return self.shared + self.sparse_layers * self.top_k * self.expert

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Weights that a step of so many rows reads: of the experts as many as evenly spread choices would meet."""
        missed = (1 - self.top_k / self.num_experts) ** rows.astype(np.float64)
        met = self.num_experts * (1 - missed)
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


def visible(lengths: NDArray[np.int64], window: int) -> int:
    """Cached tokens that queries at these lengths, themselves included, attend to."""
    return int((np.minimum(lengths, window) if window else lengths).sum())


def floor(spec: ModelSpec, workload: Workload, running: int, itemsize: int, ceilings: Ceilings) -> Floor:
    """The floor of a workload whose prompts share no prefix, with `running` requests at most at a time.

    `itemsize` is the bytes of a weight and of an element of the KV cache.
    """
    inputs = [len(prompt) for prompt in workload.prompts]
    outputs = [params.max_tokens or 0 for params in workload.params]
    matrices = Matrices.of(spec)
    prompt_lengths = np.concatenate([np.arange(1, n + 1) for n in inputs])
    decode_lengths = np.concatenate([np.arange(n + 1, n + m) for n, m in zip(inputs, outputs, strict=True)])
    kv_width = 2 * spec.num_kv_heads * spec.head_dim * itemsize
    kv_bytes = kv_width * sum(visible(decode_lengths, window) for window in spec.windows)
    pairs = sum(visible(prompt_lengths, window) for window in spec.windows)
    prefill_flops = 2 * matrices.active * sum(inputs) + 2 * matrices.head * len(inputs)
    prefill_flops += 4 * spec.num_heads * spec.head_dim * pairs  # scores and their sum over values, 2 flops each
    rows = decode_batches(outputs, running)
    reading = matrices.read(rows) * itemsize / ceilings.read
    computing = 2.0 * (matrices.active + matrices.head) * rows / ceilings.flops
    return Floor(
        prefill_seconds=prefill_flops / ceilings.flops,
        kv_seconds=kv_bytes / ceilings.read,
        product_seconds=float(np.maximum(reading, computing).sum()),
        prefill_flops=prefill_flops,
        kv_bytes=kv_bytes,
        decode_steps=len(rows),
        output_tokens=sum(outputs),
    )
