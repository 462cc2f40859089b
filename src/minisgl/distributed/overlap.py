"""Sums over ranks behind products: the rows of a large step take turns, and one half's sum runs under the other's work.

Per layer, with halves A and B: o(A), o(B), MLP(A), MLP(B), then attention's input QKV(A), QKV(B). The sum of o(A) runs
beside o(B), that of o(B) beside MLP(A), that of MLP(A) beside MLP(B), that of MLP(B) beside QKV(A).

No two ranks can wait for each other: every rank runs the group's sums in one order, one at a time. Those of halves
follow each other on one stream; the compute stream's come before the first of them, which waits for all that was
launched, or after the last, for which the compute stream waits. Halves are summed by NCCL only: what symmetric memory
takes, whose kernels wait for the other ranks' by themselves, is never cut.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minisgl.core.ops import Norm, Operations, Turns
from minisgl.distributed.collectives import Collectives

TILE = 128
"""The first half is a multiple of so many rows, which matrix products cut their output into."""
FIRST = -1
"""Priority of the sums' stream: as soon as a multiprocessor has room, a waiting sum gets it before a waiting product.
A sum needs few of them, and until every rank's has begun none goes on."""


class OverlappedSums:
    """Sums of the halves of a step, on a stream of their own; on the CPU at once, for the same order of everything.

    `ops` are one device's. Halves have at least `least_rows` rows, and parts of more than `beyond` bytes.
    """

    def __init__(self, ranks: Collectives, ops: Operations, least_rows: int, beyond: int, device: torch.device) -> None:
        self.ranks = ranks
        self.add_rms_norm = ops.add_rms_norm
        self.least_rows = least_rows
        self.beyond = beyond
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=FIRST)  # type: ignore[no-untyped-call]

    def cut(self, residual: Tensor) -> Turns | None:
        """Halves of the rows of a residual stream (T, D); None when they are too small, or a graph is captured."""
        rows = len(residual)
        tile = min(TILE, self.least_rows)
        first = rows // 2 // tile * tile  # the smaller half: its sum is the one that has least to hide behind
        if first < self.least_rows or first * residual.shape[1] * residual.element_size() <= self.beyond:
            return None
        if self.stream is not None and torch.cuda.is_current_stream_capturing():
            return None
        return Turns((first, rows - first), self.add)

    def add(self, part: Tensor) -> Norm:
        """Begin the sum of every rank's part, in its place; the norm waits for it."""
        if self.stream is None:
            return partial(self.add_rms_norm, self.ranks.all_reduce(part))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            total = self.ranks.all_reduce(part)
            done = self.stream.record_event()

        def norm(residual: Tensor, weight: Tensor, eps: float) -> Tensor:
            # It holds `total`, so nobody gets that memory before the compute stream, which alone allocates, has waited.
            torch.cuda.current_stream().wait_event(done)
            return self.add_rms_norm(total, residual, weight, eps)

        return norm
