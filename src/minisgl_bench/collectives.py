"""Microseconds of each all-reduce of rows x hidden in bf16, alone and with the norm: median replays of a graph.

Each is checked against a plain sum first, and one that raises on a rank says why. On a CPU gloo is timed.
"""

import argparse
import json
import statistics
import tempfile
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from minisgl.cli import Parser
from minisgl.core.ops import add_rms_norm
from minisgl.distributed.collectives import attempt, expect_close, join_group, noise, select_nccl
from minisgl.errors import ConfigError
from minisgl.gpu.operations import operations_for
from minisgl_bench.command import count
from minisgl_bench.gpu_timing import graph_us
from minisgl_bench.report import require_writable

REPLAYS, EPS = 50, 1e-6
LARGEST_STEP = 512  # rows of the largest decode step: only an all-reduce may have more
# Checks a collective for a number of rows, and returns the call that is timed.
MakeCall = Callable[[int], Callable[[], object]]


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench collectives", description=__doc__)
    parser.add_argument("--tp", type=count, default=4)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--hidden", type=count, default=5120)
    parser.add_argument("--rows", nargs="+", type=count, default=[1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    require_writable(options.json)
    if options.device == "cuda" and options.tp > torch.cuda.device_count():
        raise ConfigError(f"--tp {options.tp}: there are {torch.cuda.device_count()} GPUs; give --device cpu for gloo")
    with tempfile.TemporaryDirectory(prefix="minisgl-", dir="/tmp") as folder:
        spawn(run_rank, (options, f"file://{folder}/rendezvous"), options.tp)  # type: ignore[no-untyped-call]
    return 0


def run_rank(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    CollectivesRank(rank, options, rendezvous).measure()


class CollectivesRank:
    def __init__(self, rank: int, options: argparse.Namespace, rendezvous: str) -> None:
        self.rank, self.options, self.hidden = rank, options, options.hidden
        self.cuda = options.device == "cuda"
        self.device = torch.device(f"cuda:{rank}" if self.cuda else "cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.group = join_group(rank, options.tp, rendezvous, self.device)
        self.results: dict[str, dict[str, Any]] = {}

    def measure(self) -> None:
        name = torch.cuda.get_device_name() if self.cuda else "the CPU"
        about = {"device": name, "tp": self.options.tp, "torch": torch.__version__, "hidden": self.hidden}
        self.print(f"{self.options.tp} x {name}, torch {torch.__version__}, {self.dtype}, hidden size {self.hidden}")
        collectives = self.group.collectives
        self.time("all-reduce: torch.distributed", partial(self.all_reduce, collectives.all_reduce))
        if self.cuda:
            self.time_gpu_collectives()
        if self.options.json and self.rank == 0:
            self.options.json.write_text(json.dumps({**about, **self.results}, indent=1))
        collectives.close()

    def time_gpu_collectives(self) -> None:
        nccl, note = select_nccl(self.group, self.device, disable_pynccl=False)
        if nccl is self.group.collectives:
            self.print(note)
        else:
            self.time("all-reduce: nccl4py", partial(self.all_reduce, nccl.all_reduce))
        ops, all_reduce = operations_for(self.device, self.hidden), self.group.collectives.all_reduce

        def all_reduce_then_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
            return ops.add_rms_norm(all_reduce(x), residual, weight, eps, None)

        self.time("all-reduce and norm: torch.distributed, then norm", partial(self.norm, all_reduce_then_norm))
        for name, one_shot_bytes in (("one shot", LARGEST_STEP * self.hidden * self.dtype.itemsize), ("two shots", 0)):
            fused, why = attempt(self.group, partial(self.fused_norm, one_shot_bytes))
            if fused is None:
                self.print(f"fused, {name}: {why}")
            else:
                self.time(f"all-reduce and norm: fused, {name}", partial(self.norm, fused))

    def fused_norm(self, one_shot_bytes: int) -> Callable[..., Tensor | None]:
        from minisgl.distributed.fused import FusedNorm, require_peers  # needs triton, which only GPUs do

        require_peers(self.group, self.device)
        norm = FusedNorm(self.group, self.hidden, self.dtype, self.device, one_shot_bytes)
        norm.begin(whole=True)
        return norm.add_rms_norm

    def print(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def time(self, name: str, make_call: MakeCall) -> None:
        found: dict[str, Any] = {}
        for rows in self.options.rows:
            if rows <= LARGEST_STEP or name.startswith("all-reduce:"):
                us, why = attempt(self.group, partial(self.one_figure, make_call, rows))
                found[str(rows)] = round(us, 1) if us is not None else why
        self.results[name] = found
        self.print(f"{name:50}" + "  ".join(f"{rows}: {value}" for rows, value in found.items()))

    def one_figure(self, make_call: MakeCall, rows: int) -> float:
        call = make_call(rows)
        if self.cuda:
            return graph_us(call, replays=REPLAYS)
        return 1e6 * statistics.median(timeit.repeat(call, number=1, repeat=REPLAYS))

    def terms(self, rows: int) -> tuple[Tensor, Tensor]:
        """This rank's term, and the sum of all, in float32."""
        terms = [noise(1000 * rows + i, rows, self.hidden, self.dtype, self.device) for i in range(self.group.size)]
        return terms[self.group.rank], torch.stack([term.float() for term in terms]).sum(0)

    def all_reduce(self, call: Callable[[Tensor], Tensor], rows: int) -> Callable[[], object]:
        x, total = self.terms(rows)
        expect_close(call(x.clone()), total, "it")
        return partial(call, torch.zeros_like(x))

    def norm(self, call: Callable[..., Tensor | None], rows: int) -> Callable[[], object]:
        x, total = self.terms(rows)
        weight, zero = torch.ones(self.hidden, dtype=self.dtype, device=self.device), torch.zeros_like(x)
        exact = add_rms_norm(total.to(self.dtype), zero.clone(), weight, EPS)
        if (normed := call(x.clone(), zero.clone(), weight, EPS)) is None:
            raise RuntimeError("too large")
        expect_close(normed, exact, "it")
        return partial(call, zero, zero.clone(), weight, EPS)
