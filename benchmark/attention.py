"""Microseconds of attention per layer for each backend, on this machine's card.

    python benchmark/attention.py                   decode: backend x batch x mean context x page size, inside a graph
    python benchmark/attention.py --prefill         prefill of some shapes, eager
    python benchmark/attention.py --heads 40 --kv-heads 8 --batch 1 64 256 --context 900

bf16, ragged lengths (uniform, half to one and a half times the mean context). A graph holds as many layers as it takes
to read more than the card's L2 keeps, each on its own keys and values; the figure is the median replay over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minisgl.core.attention import Int32, Rows
from minisgl.gpu.attention.interface import GraphBackend
from minisgl.core.kv_cache import KVCache
from minisgl.errors import ConfigError
from minisgl.gpu.attention.select import Shape, available_backends, make_attention

BEYOND_L2 = 400 * 10**6
DEVICE = torch.device("cuda")
PREFILLS = {
    "1x8192": [(8192, 8192)],
    "8x1024": [(1024, 1024)] * 8,
    "16x512": [(512, 512)] * 16,
    "1x2048+30k": [(2048, 32768)],
}
"""Rows as (new tokens, tokens in all)."""


def main() -> None:
    """Measure what the flags ask for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--backend", nargs="+", default=["fa", "fi", "trtllm", "triton"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", nargs="+", type=int, default=[600, 900, 1600, 4096])
    parser.add_argument("--page", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    heads = f"{args.heads}/{args.kv_heads} heads of {args.head_dim}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {heads}")
    print({name: reason or "ok" for name, reason in available_backends(DEVICE).items()})
    results = prefill_table(args) if args.prefill else decode_table(args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def shape_of(args: argparse.Namespace, page_size: int) -> Shape:
    """The shape that the flags describe."""
    return Shape(
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=torch.bfloat16,
        page_size=page_size,
    )


def decode_table(args: argparse.Namespace) -> dict[str, float]:
    """Print a line for each batch and context; return microseconds by `batch x context backend pN`."""
    columns = [(name, page) for page in args.page for name in args.backend]
    backends = {column: decoder(column[0], shape_of(args, column[1])) for column in columns}
    print(
        "batch x context".ljust(16),
        *(f"{name} p{page}".rjust(11) for name, page in columns),
        "   (TB/s of the best; host us)",
    )
    results: dict[str, float] = {}
    for batch in args.batch:
        for context in args.context:
            cells, best, hosts = [], float("inf"), []
            for (name, page), backend in backends.items():
                if backend is None:
                    cells.append("-".rjust(11))
                    continue
                micros, host, volume = time_decode(backend, args, batch, context, page)
                results[f"{batch}x{context} {name} p{page}"] = micros
                cells.append(f"{micros:11.1f}")
                best = min(best, micros)
                if host > 2:
                    hosts.append(f"{name} p{page} {host:.0f}")
            print(
                f"{batch} x {context}".ljust(16),
                *cells,
                f"   {volume / best / 1e6:.2f}; {', '.join(hosts)}",
                flush=True,
            )
    return results


def decoder(name: str, shape: Shape) -> GraphBackend | None:
    """The decode side of a backend, or None where it does not work."""
    try:
        backend = make_attention(name, shape, DEVICE)[0].decode
    except ConfigError as error:
        print(f"{name}: {error}")
        return None
    return backend if isinstance(backend, GraphBackend) else None


def rows_of(lens: Int32, query_lens: Int32, page_size: int, max_pages: int) -> tuple[Rows, int]:
    """Rows on pages in random order, and how many pages they take."""
    counts = -(-lens // page_size)
    used = int(counts.sum())
    order = np.random.default_rng(0).permutation(used).astype(np.int32)
    table = np.full((len(lens), max_pages), used, np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        table[row, :count] = order[end - count : end]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    slots = np.arange(len(lens), dtype=np.int32)
    return Rows(
        page_table=torch.from_numpy(table).to(DEVICE),
        slots=slots,
        query_lens=query_lens,
        kv_lens=lens,
        slots_device=torch.from_numpy(slots.astype(np.int64)).to(DEVICE),
        cu_query_lens=torch.from_numpy(starts).to(DEVICE),
        kv_lens_device=torch.from_numpy(lens).to(DEVICE),
    ), used


def time_decode(
    backend: GraphBackend, args: argparse.Namespace, batch: int, context: int, page: int
) -> tuple[float, float, float]:
    """Microseconds a layer, microseconds of host time to prepare a step, bytes of keys and values a layer."""
    lens = np.random.default_rng(1).integers(context // 2, context * 3 // 2 + 1, batch).astype(np.int32)
    volume = float(lens.sum()) * 2 * args.kv_heads * args.head_dim * 2
    layers = int(min(32, max(4, BEYOND_L2 // volume)))
    max_pages = -(-8192 // page)
    rows, used = rows_of(lens, np.ones_like(lens), page, max_pages)
    kv = random_kv(layers, used + 1, page, args)
    q = torch.randn(batch, args.heads, args.head_dim, dtype=torch.bfloat16, device=DEVICE)
    assert rows.kv_lens_device is not None
    graph = backend.graph_decode(rows.page_table, rows.kv_lens_device, kv, max_pages * page)
    graph.prepare(lens)

    def step() -> None:
        for layer in range(layers):
            graph.attention.run(q, layer, 0)

    step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    micros = median_micros(captured.replay, 15) / layers
    begin = time.perf_counter()
    for _ in range(20):
        lens = lens + page
        graph.prepare(lens)
    return micros, (time.perf_counter() - begin) / 20 * 1e6, volume


def prefill_table(args: argparse.Namespace) -> dict[str, float]:
    """Print a line for each shape; return microseconds a layer by `shape backend pN`."""
    columns = [(name, page) for page in args.page for name in args.backend if name != "trtllm"]
    print("prefill".ljust(16), *(f"{name} p{page}".rjust(11) for name, page in columns), "   (TFLOP/s of the best)")
    results: dict[str, float] = {}
    backends = {(name, page): make_attention(name, shape_of(args, page), DEVICE)[0].prefill for name, page in columns}
    for label, chunks in PREFILLS.items():
        cells, best = [], float("inf")
        for (name, page), backend in backends.items():
            query_lens, lens = (np.array(part, np.int32) for part in zip(*chunks, strict=True))
            rows, used = rows_of(lens, query_lens, page, -(-int(lens.max()) // page))
            kv = random_kv(1, used + 1, page, args)
            q = torch.randn(int(query_lens.sum()), args.heads, args.head_dim, dtype=torch.bfloat16, device=DEVICE)
            planned = backend.plan_prefill(rows, kv)
            planned.run(q, 0, 0)
            micros = median_micros(partial(planned.run, q, 0, 0), 7)
            results[f"{label} {name} p{page}"] = micros
            cells.append(f"{micros:11.1f}")
            best = min(best, micros)
        pairs = sum(n * (total - n) + n * (n + 1) / 2 for n, total in chunks)
        print(label.ljust(16), *cells, f"   {4 * pairs * args.heads * args.head_dim / best / 1e6:.0f}", flush=True)
    return results


def random_kv(layers: int, pages: int, page_size: int, args: argparse.Namespace) -> KVCache:
    """A cache of standard normal keys and values."""
    shape = (layers, pages, page_size, args.kv_heads, args.head_dim)
    k = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    return KVCache(k, torch.empty_like(k).normal_())


def median_micros(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the card, after two to warm up."""
    times: list[float] = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
