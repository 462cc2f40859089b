"""Microseconds of attention per layer for each backend, on this machine's GPU.

    minisgl bench attention                   decode: backend x batch x mean context x page size, inside a graph
    minisgl bench attention --prefill         prefill of some shapes, eager
    minisgl bench attention --heads 40 --kv-heads 8 --batch 1 64 256 --context 900

bf16, ragged lengths (uniform, half to one and a half times the mean context). A graph holds as many layers as it takes
to read more than the GPU's L2 keeps, each on its own keys and values; the figure is the median replay over them.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minisgl.cli import Parser
from minisgl.core.attention import Attention, GraphBackend, Int32, SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.errors import ConfigError
from minisgl.gpu.attention.select import Shape, available_backends, make_attention
from minisgl_bench.gpu_timing import CUDA, DTYPE, graph_us, median_us, noise, require_gpu

BEYOND_L2 = 400 * 10**6
LONGEST = 8192
PREFILLS = {
    "1x8192": [(8192, 8192)],
    "8x1024": [(1024, 1024)] * 8,
    "16x512": [(512, 512)] * 16,
    "1x2048+30k": [(2048, 32768)],
}
"""Rows as (new tokens, tokens in all)."""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench attention", description=__doc__)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend", nargs="+", default=["fa", "fi", "trtllm", "triton"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", nargs="+", type=int, default=[600, 900, 1600, 4096])
    parser.add_argument("--page", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    require_gpu()
    heads = f"{args.heads}/{args.kv_heads} heads of {args.head_dim}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {heads}")
    print({name: reason or "ok" for name, reason in available_backends(CUDA).items()})
    results = prefill_table(args) if args.prefill else decode_table(args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


def make_backends(args: argparse.Namespace) -> dict[str, tuple[Attention, int]]:
    """Attention and page size by `backend pN`, for those that work here."""
    found = {}
    for page, name in itertools.product(args.page, args.backend):
        shape = Shape(
            num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.head_dim, dtype=DTYPE, page_size=page
        )
        try:
            found[f"{name} p{page}"] = make_attention(name, shape, CUDA)[0], page
        except ConfigError as error:
            print(f"{name} p{page}: {error}")
    return found


def decode_table(args: argparse.Namespace) -> dict[str, float]:
    """Print a line for each batch and context; return microseconds by `batch x context backend pN`."""
    backends = {
        column: (attention.decode, page)
        for column, (attention, page) in make_backends(args).items()
        if isinstance(attention.decode, GraphBackend)
    }
    print("batch x context".ljust(16), *(column.rjust(11) for column in backends), "   (TB/s of the best; host us)")
    results: dict[str, float] = {}
    for batch, context in itertools.product(args.batch, args.context):
        lens = np.random.default_rng(1).integers(context // 2, context * 3 // 2 + 1, batch).astype(np.int32)
        volume = float(lens.sum()) * 2 * args.kv_heads * args.head_dim * 2  # bytes of keys and values a layer
        layers = int(min(32, max(4, BEYOND_L2 // volume)))
        times, hosts = {}, []
        for column, (backend, page) in backends.items():
            times[column], host = time_decode(backend, args, lens, layers, page)
            if host > 2:
                hosts.append(f"{column} {host:.0f}")
        rate = volume / min(times.values(), default=float("inf")) / 1e6
        cells = (f"{us:11.1f}" for us in times.values())
        print(f"{batch} x {context}".ljust(16), *cells, f"   {rate:.2f}; {', '.join(hosts)}", flush=True)
        results |= {f"{batch}x{context} {column}": us for column, us in times.items()}
    return results


def rows_of(lens: Int32, query_lens: Int32, page_size: int, max_pages: int) -> tuple[SequenceBatch, int]:
    """Rows on pages in random order, and how many pages they take."""
    counts = -(-lens // page_size)
    used = int(counts.sum())
    order = np.random.default_rng(0).permutation(used).astype(np.int32)
    table = np.full((len(lens), max_pages), used, np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        table[row, :count] = order[end - count : end]
    slots = np.arange(len(lens), dtype=np.int32)
    return SequenceBatch(
        page_table=torch.from_numpy(table).to(CUDA),
        slots=slots,
        query_lens=query_lens,
        kv_lens=lens,
        slots_device=torch.from_numpy(slots.astype(np.int64)).to(CUDA),
        cu_query_lens=torch.from_numpy(np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)).to(CUDA),
        kv_lens_device=torch.from_numpy(lens).to(CUDA),
    ), used


def time_decode(
    backend: GraphBackend, args: argparse.Namespace, lens: Int32, layers: int, page: int
) -> tuple[float, float]:
    max_pages = -(-LONGEST // page)
    rows, used = rows_of(lens, np.ones_like(lens), page, max_pages)
    kv = random_kv(layers, used + 1, page, args)
    q = noise(len(lens), args.heads, args.head_dim)
    assert rows.kv_lens_device is not None
    graph = backend.graph_decode(rows.page_table, rows.kv_lens_device, kv, max_pages * page)
    graph.prepare(lens)

    def step() -> None:
        for layer in range(layers):
            graph.attention.run(q, layer, 0)

    us = graph_us(step, calls=1, replays=15) / layers
    begin = time.perf_counter()
    for _ in range(20):
        lens = lens + page
        graph.prepare(lens)
    return us, (time.perf_counter() - begin) / 20 * 1e6


def prefill_table(args: argparse.Namespace) -> dict[str, float]:
    """Print a line for each shape; return microseconds a layer by `shape backend pN`."""
    args.backend = [name for name in args.backend if name != "trtllm"]
    backends = make_backends(args)
    print("prefill".ljust(16), *(column.rjust(11) for column in backends), "   (TFLOP/s of the best)")
    results: dict[str, float] = {}
    for label, chunks in PREFILLS.items():
        query_lens, lens = (np.array(part, np.int32) for part in zip(*chunks, strict=True))
        q = noise(int(query_lens.sum()), args.heads, args.head_dim)
        times = {}
        for column, (attention, page) in backends.items():
            rows, used = rows_of(lens, query_lens, page, -(-int(lens.max()) // page))
            planned = attention.prefill.plan_prefill(rows, random_kv(1, used + 1, page, args))
            times[column] = median_us(partial(planned.run, q, 0, 0), 7)
        pairs = sum(n * (total - n) + n * (n + 1) / 2 for n, total in chunks)
        rate = 4 * pairs * args.heads * args.head_dim / min(times.values(), default=float("inf")) / 1e6
        print(label.ljust(16), *(f"{us:11.1f}" for us in times.values()), f"   {rate:.0f}", flush=True)
        results |= {f"{label} {column}": us for column, us in times.items()}
    return results


def random_kv(layers: int, pages: int, page_size: int, args: argparse.Namespace) -> KVCache:
    k = torch.empty((layers, pages, page_size, args.kv_heads, args.head_dim), dtype=DTYPE, device=CUDA).normal_()
    return KVCache(k, torch.empty_like(k).normal_())
