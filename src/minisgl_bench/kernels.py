"""Microseconds of the fused kernels on this machine's GPU, bf16; the tests compare them with their references.

    minisgl bench kernels                         all kernels, Qwen3-0.6B, 14B and 30B-A3B shapes
    minisgl bench kernels --only sampling moe     some of them

A figure is the median replay of a CUDA graph of 20 launches, divided by 20. Bytes are those that must move: inputs
once, outputs once, for the experts the weights of those that are hit. Small activations stay in L2, as in a step.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minisgl.cli import Parser
from minisgl.gpu.kernels import elementwise, moe, sampling
from minisgl_bench.gpu_timing import CUDA, DTYPE, HEAD_DIM, MODELS, VOCAB, graph_us, noise, require_gpu, sampling_rows

SHAPES = tuple(itertools.product(("0.6B", "14B"), (1, 8, 64, 256, 4096)))
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T 0.6": {"temperature": 0.6},
    "top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p 0.1": {"temperature": 0.6, "min_p": 0.1},
}


class KernelTable:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
        print(f"{'kernel':<14} {'shape':<21} {'T':>5} {'µs':>8} {'GB/s':>6} {'TF/s':>5}")

    def add(self, kernel: str, shape: str, tokens: int, run: Callable[[], object], moved: int, flops: int = 0) -> None:
        """`moved` are the bytes, and `flops` the work, that a call is worth."""
        us = graph_us(run)
        rates = f"{moved / us / 1e3:>6.0f} {flops / us / 1e6:>5.0f}"
        print(f"{kernel:<14} {shape:<21} {tokens:>5} {us:>8.1f} {rates}", flush=True)
        self.rows.append({"kernel": kernel, "shape": shape, "tokens": tokens, "us": us})


def norms(table: KernelTable) -> None:
    """The stream and the branch are read; the stream and the norm are written."""
    for model, tokens in SHAPES:
        dim = MODELS[model][0]
        x, residual, weight = noise(tokens, dim), noise(tokens, dim), noise(dim)
        run = partial(elementwise.add_rms_norm, x, residual, weight, 1e-6)
        table.add("add_rms_norm", model, tokens, run, 4 * x.nbytes)


def activations(table: KernelTable) -> None:
    """Gate and up are read, their combination is written."""
    for model, tokens in SHAPES:
        x = noise(tokens, 2 * MODELS[model][3])
        table.add("silu_mul", model, tokens, partial(elementwise.silu_mul, x), x.nbytes * 3 // 2)


def heads(table: KernelTable) -> None:
    """The QKV GEMM's output is read; queries, keys and values are written."""
    for model, tokens in SHAPES:
        _, num_heads, kv_heads, _ = MODELS[model]
        x = noise(tokens, (num_heads + 2 * kv_heads) * HEAD_DIM)
        angles = torch.rand(8192, HEAD_DIM // 2, device=CUDA) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        positions = torch.randint(8192, (tokens,), dtype=torch.int32, device=CUDA)
        slots = torch.randperm(1024 * 16, device=CUDA)[:tokens]
        caches = [torch.zeros(1025, 16, kv_heads, HEAD_DIM, dtype=DTYPE, device=CUDA) for _ in range(2)]
        norm_weights = noise(HEAD_DIM), noise(HEAD_DIM)
        run = partial(elementwise.rope_store_kv, x, *norm_weights, 1e-6, cos_sin, positions, slots, *caches)
        table.add("rope_store_kv", model, tokens, run, 2 * x.nbytes)


def samplers(table: KernelTable) -> None:
    """The logits are read once, whatever the filter."""
    for (name, values), tokens in itertools.product(FILTERS.items(), (1, 8, 64, 256)):
        logits = noise(tokens, VOCAB, scale=2.0)
        rows = sampling_rows(tokens, CUDA, torch.randint(2**62, (tokens,)), **values)
        slots = torch.arange(tokens, device=CUDA)
        positions = torch.randint(2000, (tokens,), dtype=torch.int32, device=CUDA)
        table.add("sample", name, tokens, partial(sampling.sample, logits, rows, slots, positions), logits.nbytes)


def experts(table: KernelTable) -> None:
    """Qwen3-30B-A3B: 128 experts of width 768, 8 of them a token."""
    dim, width, number, top_k = 2048, 768, 128, 8
    router = noise(number, dim, scale=dim**-0.5)
    gate_up = noise(number, 2 * width, dim, scale=dim**-0.5)
    down = noise(number, dim, width, scale=width**-0.5)
    for tokens in (1, 8, 64, 256, 4096):
        x = noise(tokens, dim)
        hit = len(set(torch.nn.functional.linear(x, router).topk(top_k).indices.flatten().tolist()))
        moved = hit * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes
        run = partial(moe.moe, x, router, gate_up, down, top_k, True)
        table.add("moe", "30B-A3B", tokens, run, moved, 2 * tokens * top_k * 3 * width * dim)


KERNELS = {"norm": norms, "activation": activations, "qkv": heads, "sampling": samplers, "moe": experts}


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    require_gpu()
    torch.manual_seed(0)
    table = KernelTable()
    for kernel in options.only:
        KERNELS[kernel](table)
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=1))
    return 0
