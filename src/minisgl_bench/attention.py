"""Microseconds of decode attention per layer on this machine's GPU: backend x batch x mean context x page size.

bf16, lengths uniform in half to one and a half times the mean. A graph reads with its layers more than the L2 holds.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from minisgl.cli import Parser
from minisgl.core.attention import Attention
from minisgl.core.kv_cache import KVCache
from minisgl.core.plan import Int32
from minisgl.errors import ConfigError
from minisgl.gpu.attention.interface import GraphBackend, decode_batch
from minisgl.gpu.attention.select import Shape, available_backends, make_attention
from minisgl_bench.command import count
from minisgl_bench.gpu_timing import CUDA, DTYPE, HEAD_DIM, graph_us, noise, print_figure, print_heading

BEYOND_L2 = 400 * 10**6
LONGEST = 8192


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench attention", description=__doc__)
    parser.add_argument("--heads", type=count, default=16)
    parser.add_argument("--kv-heads", type=count, default=8)
    parser.add_argument("--backend", nargs="+", default=["fa", "fi", "trtllm", "triton"])
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", nargs="+", type=count, default=[600, 900, 1600, 4096])
    parser.add_argument("--page", nargs="+", type=count, default=[16, 64])
    options = parser.parse_args(arguments)
    print_heading()
    print({name: reason or "ok" for name, reason in available_backends(CUDA).items()})
    backends: dict[str, tuple[Attention, int]] = {}  # attention and page size by `backend pN`, for those that work here
    for page, name in itertools.product(options.page, options.backend):
        shape = Shape(head_dim=HEAD_DIM, dtype=DTYPE, page_size=page)
        try:
            backends[f"{name} p{page}"] = make_attention(name, shape, CUDA)[0], page
        except ConfigError as error:
            print(f"{name} p{page}: {error}")
    for batch, context in itertools.product(options.batch, options.context):
        for name, (attention, page) in backends.items():
            if isinstance(attention.decode, GraphBackend):
                us, volume = time_decode(attention.decode, options.heads, options.kv_heads, batch, context, page)
                print_figure(name, f"{batch} x {context}", batch, us, volume)
    return 0


def time_decode(
    backend: GraphBackend, heads: int, kv_heads: int, batch: int, context: int, page: int
) -> tuple[float, float]:
    """Microseconds a layer, and the bytes of keys and values that it reads."""
    lens = np.random.default_rng(1).integers(context // 2, context * 3 // 2 + 1, batch).astype(np.int32)
    volume = float(lens.sum()) * 2 * kv_heads * HEAD_DIM * DTYPE.itemsize
    layers = int(min(32, max(4, BEYOND_L2 // volume)))
    max_pages = -(-LONGEST // page)
    pages, used = page_table(lens, page, max_pages)
    k, v = (noise(layers, used + 1, page, kv_heads, HEAD_DIM) for _ in range(2))
    q = noise(batch, heads, HEAD_DIM)
    rows = decode_batch(pages, torch.from_numpy(lens).to(CUDA), max_pages * page)
    graph = backend.graph_decode(rows, KVCache(k, v))
    graph.prepare(lens)

    def step() -> None:
        for layer in range(layers):
            graph.attention.run(q, layer, 0)

    return graph_us(step, calls=1, replays=15) / layers, volume


def page_table(lens: Int32, page_size: int, max_pages: int) -> tuple[torch.Tensor, int]:
    """Pages of these sequences in random order, int32 (rows, max_pages), and their number; unused entries name it."""
    counts = -(-lens // page_size)
    used = int(counts.sum())
    order = np.random.default_rng(0).permutation(used).astype(np.int32)
    pages = np.full((len(lens), max_pages), used, np.int32)
    for row, (end, held) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        pages[row, :held] = order[end - held : end]
    return torch.from_numpy(pages).to(CUDA), used
