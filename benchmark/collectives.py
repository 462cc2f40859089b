"""Microseconds of what the cards of a host do together, each way there is, checked against a plain sum.

    python benchmark/collectives.py --tp 4                    sums, sums with the norm, sampling
    python benchmark/collectives.py --tp 4 --rows 1 64 256 --hidden 5120 --json out.json
    python benchmark/collectives.py --tp 2 --device cpu       gloo alone

Sums of rows x hidden in bf16, as they end each block of a model. A figure is the median replay of a CUDA graph of CALLS
calls, as rank 0 sees it; every way is first checked eagerly on every rank. A way that raises says why and is left out.
The ways are tried in the order of the table, the safest first, and each is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.ops import Operations, add_rms_norm
from minisgl.core.sampler import SamplingRows
from minisgl.distributed.collectives import TPGroup, join_group
from minisgl.distributed.operations import parallel_operations
from minisgl.distributed.select import attempt, fuse, reach
from minisgl.distributed.shard import vocab_shard
from minisgl.gpu.operations import operations_for

CALLS, REPLAYS, WARM_UP = 20, 50, 3
EPS = 1e-6
VOCAB = 151936

Call = Callable[[], Any]


def main() -> None:
    """Be rank 0, with the other ranks as processes that end with this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192])
    parser.add_argument("--only", help="ways whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minisgl-", dir="/tmp") as folder:
        others = []
        if args.meeting is None:
            args.meeting = f"file://{folder}/meeting"
            command = [sys.executable, *sys.argv, "--meeting", args.meeting]
            others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, args.tp)]
        try:
            measure(args)
        finally:
            for process in others:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def measure(args: argparse.Namespace) -> None:
    """Measure and print, on rank 0."""
    cuda = args.device == "cuda"
    device = torch.device(f"cuda:{args.rank}" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    group = join_group(args.rank, args.tp, args.meeting, device)
    name = torch.cuda.get_device_name() if cuda else "the CPU"
    tell(args, f"{args.tp} x {name}, torch {torch.__version__}, {dtype}, hidden size {args.hidden}")
    results: dict[str, dict[str, Any]] = {}
    for kind, way, make in ways(group, args.hidden, dtype, device):
        if args.only and args.only not in f"{kind} {way}":
            continue
        found: dict[str, Any] = {}
        rows_of = [rows for rows in args.rows if rows <= 512] if kind != "sum" else args.rows
        for rows in rows_of:
            figure, why = attempt(group, partial(one_figure, make, rows, device))
            found[str(rows)] = round(figure, 1) if figure is not None else why
        results[f"{kind}: {way}"] = found
        tell(args, f"{kind + ': ' + way:42}" + "  ".join(f"{rows}: {value}" for rows, value in found.items()))
    if args.json and args.rank == 0:
        about = {"device": name, "tp": args.tp, "torch": torch.__version__, "hidden": args.hidden}
        args.json.write_text(json.dumps({**about, **results}, indent=1))
    group.collectives.close()


def tell(args: argparse.Namespace, line: str) -> None:
    if args.rank == 0:
        print(line, flush=True)


def one_figure(make: Callable[[int], tuple[Call, Call]], rows: int, device: torch.device) -> float:
    """Microseconds of a way's call, after its check."""
    check, call = make(rows)
    check()
    for _ in range(WARM_UP):
        call()
    if device.type == "cpu":
        return 1e6 * statistics.median(timed(call) for _ in range(REPLAYS))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]  # type: ignore[no-untyped-call]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return 1e3 * float(statistics.median(times)) / CALLS


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def part(rows: int, hidden: int, dtype: torch.dtype, device: torch.device, rank: int) -> Tensor:
    """A rank's part of a sum, which every rank can make."""
    generator = torch.Generator().manual_seed(1000 * rows + rank)
    return torch.randn(rows, hidden, generator=generator).to(dtype).to(device)


def expect(found: Tensor, expected: Tensor) -> None:
    """Raise where a result is further from the reference than rounding explains."""
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error < 0.02:
        raise RuntimeError(f"off by {error:.3f} of the largest")


def ways(
    group: TPGroup, hidden: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, str, Callable[[int], tuple[Call, Call]]]]:
    """Kind, name, and what makes a check and a call for a number of rows; the safest way first."""
    ops = operations_for(device, hidden)
    base = group.collectives

    def parts(rows: int) -> tuple[Tensor, Tensor]:
        total = torch.stack([part(rows, hidden, dtype, device, rank).float() for rank in range(group.size)]).sum(0)
        return part(rows, hidden, dtype, device, group.rank), total

    def sums(all_reduce: Callable[[Tensor], Tensor], rows: int, stages: Any = None) -> tuple[Call, Call]:
        x, total = parts(rows)
        stage = None if stages is None else stages.take(rows, hidden)  # where a product would have written
        scratch = torch.zeros_like(x) if stage is None else stage
        return lambda: expect(all_reduce(x.clone()), total), lambda: all_reduce(scratch)

    def norms(add_rms_norm: Callable[..., Tensor], rows: int) -> tuple[Call, Call]:
        x, total = parts(rows)
        weight = torch.ones(hidden, dtype=dtype, device=device)
        residual = torch.zeros_like(x)
        exact = add_rms_norm_reference(total.to(dtype), weight)
        blank = torch.zeros_like(x)

        def check() -> None:
            expect(add_rms_norm(x.clone(), torch.zeros_like(x), weight, EPS), exact)

        return check, lambda: add_rms_norm(blank, residual, weight, EPS)

    yield "sum", "torch.distributed", partial(sums, base.all_reduce)
    if device.type == "cpu":
        return
    from minisgl.distributed import collectives as pynccl

    if group.least(int(pynccl.available())):
        bound, why = attempt(group, lambda: pynccl.NcclCollectives(group))
        if bound is not None:
            yield "sum", "nccl4py", partial(sums, bound.all_reduce)
        elif group.rank == 0:
            print(f"nccl4py: {why}", flush=True)
    shard = vocab_shard(VOCAB, group.rank, group.size)
    plain = parallel_operations(ops, group, shard)
    yield "sum and norm", "torch.distributed, then norm", partial(norms, plain.add_rms_norm)
    yield "sampling", "gathered, no filter", partial(sampling, plain, group, dtype, device, 1.0)
    for name, one_shot in (("one shot", 64 * 1024), ("two shots", 0)):
        config = Config(all_reduce_crossovers=f"{one_shot},{64 * 1024}")
        reached, why = attempt(group, partial(reach, config, group, hidden, dtype, device))
        if reached is None:
            tell_why(group, f"symmetric memory, {name}", why)
            continue
        yield "sum", f"symmetric memory, {name}", partial(sums, reached.all_reduce, stages=reached.stages)
        fusion, why = attempt(group, partial(fuse, group, reached, hidden, ops, shard))
        if fusion is None:
            tell_why(group, f"fused, {name}", why)
            continue
        norm = fusion.norm
        norm.begin(whole=True)

        def fused(x: Tensor, residual: Tensor, weight: Tensor, eps: float, norm: Any = norm) -> Tensor:
            found = norm.add_rms_norm(x, residual, weight, eps)
            if found is None:
                raise RuntimeError("too large")
            normed: Tensor = found
            return normed

        yield "sum and norm", f"fused, {name}", partial(norms, fused)
        if name == "two shots":
            from minisgl.distributed.fused import staged_operations

            sharded = staged_operations(ops, plain, shard, reached, fusion)
            yield "sampling", "from shards, no filter", partial(sampling, sharded, group, dtype, device, 1.0)
            yield "sampling", "gathered, top_p", partial(sampling, plain, group, dtype, device, 0.9)
            yield "sampling", "from shards, top_p", partial(sampling, sharded, group, dtype, device, 0.9)


def tell_why(group: TPGroup, what: str, why: str) -> None:
    if group.rank == 0:
        print(f"{what}: {why}", flush=True)


def add_rms_norm_reference(total: Tensor, weight: Tensor) -> Tensor:
    normed: Tensor = add_rms_norm(total, torch.zeros_like(total), weight, EPS)
    return normed


def sampling(
    ops: Operations, group: TPGroup, dtype: torch.dtype, device: torch.device, top_p: float, rows: int
) -> tuple[Call, Call]:
    """Tokens for rows of a large vocabulary at temperature 0.6, the same on every rank and as one device draws them."""
    shard = vocab_shard(VOCAB, group.rank, group.size)
    whole = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3
    mine = torch.zeros(rows, shard.width)
    mine[:, : shard.real] = whole[:, shard.first : shard.first + shard.real]
    logits = mine.to(dtype).to(device)
    table = SamplingRows(
        temperature=torch.full((rows,), 0.6, device=device),
        top_p=torch.full((rows,), top_p, device=device),
        min_p=torch.zeros(rows, device=device),
        top_k=torch.zeros(rows, dtype=torch.int32, device=device),
        seed=torch.arange(rows, device=device),
        min_len=torch.zeros(rows, dtype=torch.int32, device=device),
        stop_ids=torch.full((rows, 1), -1, dtype=torch.int32, device=device),
    )
    slots = torch.arange(rows, dtype=torch.int32, device=device)

    def call() -> Tensor:
        return ops.sample(logits, table, slots, slots, False, True, True)

    def check() -> None:
        found = call()
        expected = ops.sample_whole(whole.to(dtype).to(device), table, slots, slots, False, True, True)
        if not torch.equal(found, expected):
            raise RuntimeError(f"{int((found != expected).sum())} of {rows} tokens differ from one device's")

    return check, call


if __name__ == "__main__":
    main()
