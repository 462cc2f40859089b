"""Fused all-reduces of several ranks on one host, and what they must compute.

`python -m helpers.fused_kernel_ranks JSON` (the fields of `Case`) runs the ranks as processes that share memory, in
triton's interpreter, and ends with status 0 if every value is right.
"""

import json
import math
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from helpers.interpreter import quicken
from minisgl.core.ops import rms_norm
from minisgl.gpu.kernels import all_reduce
from minisgl.gpu.kernels.all_reduce import GENERATIONS, UNWRITTEN, ReceiveBuffers, buffer_size

EPS = 1e-6
SECONDS = 200  # after which a rank that waits for ever is ended
OPERATIONS = {1: all_reduce.one_shot_add_rms_norm, 2: all_reduce.two_shot_add_rms_norm}

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
Fill = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a group calls, in this order: (shots, rows)."""

    world: int
    dim: int
    dtype: str
    programs: int
    calls: list[tuple[int, int]]


@dataclass(frozen=True)
class Call:
    """One call on every rank: parts, residual streams and outs are lists over ranks of (T, D)."""

    shots: int
    start: Tensor
    parts: list[Tensor]
    residuals: list[Tensor]
    outs: list[Tensor]


class FusedRun:
    """The memory of all ranks and all calls, of which `run` does one rank's."""

    def __init__(self, case: Case, device: torch.device, allocate: Allocate) -> None:
        dtype: torch.dtype = getattr(torch, case.dtype)
        self.world = case.world
        generator = torch.Generator().manual_seed(case.world)

        def filled(values: Tensor) -> Tensor:
            return allocate(tuple(values.shape), dtype).copy_(values)

        def noise(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)
            values[torch.rand(shape, generator=generator) < 0.1] = -0.0
            return values

        def call(shots: int, rows: int) -> Call:
            start, parts = noise(rows, case.dim), [noise(rows, case.dim) for _ in range(case.world)]
            for row, zero in ((rows // 2, 0.0), (rows - 1, -0.0)):  # sums, and norms, of nothing but zeros
                for values in (start, *parts):
                    values[row] = zero
            outs = [filled(torch.full_like(start, math.nan)) for _ in parts]
            return Call(shots, filled(start), [filled(part) for part in parts], [filled(start) for _ in parts], outs)

        self.weight = filled(noise(case.dim))
        self.calls = [call(shots, rows) for shots, rows in case.calls]
        self.buffers = {shots: self._buffers(shots, case, device, filled) for shots in OPERATIONS}

    def _buffers(self, shots: int, case: Case, device: torch.device, filled: Fill) -> list[ReceiveBuffers]:
        world, rows = case.world, max(rows for _, rows in case.calls)
        shapes = [(rows, world)] if shots == 1 else [(-(-rows // world), world), (rows, 1)]
        sizes = [buffer_size(*shape, case.dim) for shape in shapes]
        memory = [[filled(torch.full((size,), UNWRITTEN)) for _ in range(world)] for size in sizes]
        addresses = tuple(torch.tensor([x.data_ptr() for x in ranks], device=device) for ranks in memory)
        own = zip(*memory, strict=True)
        generations = torch.zeros(world, rows, dtype=torch.int32, device=device)
        return [
            ReceiveBuffers(rank, world, rows, case.dim, tuple(tensors), addresses, generations[rank])
            for rank, tensors in enumerate(own)
        ]

    def load(self, rank: int) -> None:
        """Compile and load a rank's kernels, which on a GPU must not happen while another rank waits for it."""
        empty = self.calls[0].start[:0]
        for shots, operation in OPERATIONS.items():
            operation(self.buffers[shots][rank], empty, empty, self.weight, EPS, empty)

    def run(self, rank: int) -> None:
        for call in self.calls:
            buffers = self.buffers[call.shots][rank]
            OPERATIONS[call.shots](buffers, call.parts[rank], call.residuals[rank], self.weight, EPS, call.outs[rank])

    def check_reset(self, rank: int) -> None:
        """Raise unless the two generations that come next hold nothing but sentinels."""
        for shots in OPERATIONS:
            buffers = self.buffers[shots][rank]
            generations = buffers.generations.tolist()
            for number, own in enumerate(buffers.own):
                owned = shots == 2 and number == 0
                senders = 1 if number == 1 else self.world
                rows = list(range(rank, buffers.rows, self.world)) if owned else list(range(buffers.rows))
                boxes = own.view(GENERATIONS, -1, senders, buffers.dim)
                for place, row in enumerate(rows):
                    for after in (0, 1):
                        box = boxes[(generations[row] + after) % GENERATIONS, place]
                        assert bool((torch.signbit(box) & (box == 0)).all()), (shots, number, row, after)

    def check(self) -> None:
        """Raise AssertionError unless every call's results are the reference's, with the same bits on all ranks."""
        for call in self.calls:
            total = torch.stack(call.parts).float().sum(0).to(call.start.dtype)
            expected = (call.start.float() + total.float()).to(call.start.dtype)
            normed = rms_norm(expected, self.weight, EPS)
            for rank in range(self.world):
                own = slice(None) if call.shots == 1 else slice(rank, None, self.world)
                torch.testing.assert_close(call.residuals[rank][own], expected[own])
                torch.testing.assert_close(call.outs[rank], normed, rtol=2e-2, atol=1e-2)
                assert torch.equal(call.outs[rank], call.outs[0])


def shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that processes forked from this one share."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, max(1, count * dtype.itemsize)), dtype=dtype, count=count).view(shape)


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    quicken()
    run = FusedRun(case, torch.device("cpu"), shared)
    with mock.patch.object(all_reduce, "MAX_BLOCKS", case.programs):
        ranks = {fork(run, rank) for rank in range(case.world)}
        while ranks:
            process, status = os.wait()
            ranks.discard(process)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                raise SystemExit(f"a rank ended with {status}")
    run.check()


def fork(run: FusedRun, rank: int) -> int:
    if process := os.fork():
        return process
    try:
        signal.alarm(SECONDS)
        run.load(rank)
        run.run(rank)
        run.check_reset(rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
