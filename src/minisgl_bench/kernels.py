"""Check every fused kernel against its reference in bf16, then print its microseconds, on this machine's GPU.

    minisgl bench kernels                         all kernels, Qwen3-0.6B, 14B and 30B-A3B shapes
    minisgl bench kernels --only sampling moe     some of them
    minisgl bench kernels --check                 no timing

A figure is the median replay of a CUDA graph of 20 launches, divided by 20. Bytes are those that must move: inputs
once, outputs once, for the experts the weights of those that are hit. Small activations stay in L2, as in a step.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.cli import Parser
from minisgl.ops import reference
from minisgl.ops.kernels import activation, moe, norm, qkv, sampling
from minisgl.ops.sampling import sample as reference_sample
from minisgl_bench.gpu_timing import (
    CUDA,
    DTYPE,
    HEAD_DIM,
    MODELS,
    VOCAB,
    graph_microseconds,
    noise,
    relative_error,
    require_gpu,
    sampling_rows,
)

SHAPES = ("0.6B", "14B")
TOKENS = (1, 8, 64, 256, 4096)
SAMPLED = (1, 8, 64, 256)
TOLERANCE = 1e-2
"""Allowed error, bf16 rounding giving some 2e-3; of tokens, the share that may differ."""
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T 0.6": {"temperature": 0.6},
    "top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p 0.1": {"temperature": 0.6, "min_p": 0.1},
}
Pairs = Sequence[tuple[Tensor, Tensor]]


class KernelTable:
    """Checks, times and prints one kernel at one shape after the other."""

    def __init__(self, timed: bool) -> None:
        self.timed = timed
        self.rows: list[dict[str, Any]] = []
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
        print(f"{'kernel':<14} {'shape':<21} {'T':>5} {'error':>9} {'µs':>8} {'GB/s':>6} {'TF/s':>5}")

    def add(
        self, kernel: str, shape: str, tokens: int, run: Callable[[], Tensor], pairs: Pairs, moved: int, flops: int = 0
    ) -> None:
        """`pairs` are outputs that should agree; `moved` are the bytes, and `flops` the work, that a call is worth."""
        worst = max(relative_error(found, expected) for found, expected in pairs)
        us = graph_microseconds(run) if self.timed else 0.0
        gb, tf = (moved / us / 1e3, flops / us / 1e6) if us else (0.0, 0.0)
        mark = "  WRONG" if worst > TOLERANCE else ""
        line = f"{kernel:<14} {shape:<21} {tokens:>5} {worst:>9.1e} {us:>8.1f} {gb:>6.0f} {tf:>5.0f}{mark}"
        print(line, flush=True)
        self.rows.append({"kernel": kernel, "shape": shape, "tokens": tokens, "error": worst, "us": us})


def norms(table: KernelTable) -> None:
    """The stream and the branch are read; the stream and the norm are written."""
    for model, tokens in itertools.product(SHAPES, TOKENS):
        dim = MODELS[model][0]
        x, residual, weight = noise(tokens, dim), noise(tokens, dim), noise(dim)
        ours, theirs = residual.clone(), residual.clone()
        fused = norm.add_rms_norm(x, ours, weight, 1e-6), reference.add_rms_norm(x, theirs, weight, 1e-6)
        alone = norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
        run = partial(norm.add_rms_norm, x, residual, weight, 1e-6)
        table.add("add_rms_norm", model, tokens, run, [fused, (ours, theirs), alone], 4 * x.nbytes)


def activations(table: KernelTable) -> None:
    """Gate and up are read, one times the other's SiLU is written."""
    for model, tokens in itertools.product(SHAPES, TOKENS):
        x = noise(tokens, 2 * MODELS[model][3])
        pair = activation.silu_mul(x), reference.silu_mul(x)
        table.add("silu_mul", model, tokens, partial(activation.silu_mul, x), [pair], x.nbytes * 3 // 2)


def heads(table: KernelTable) -> None:
    """The QKV GEMM's output is read; queries, keys and values are written."""
    for model, tokens in itertools.product(SHAPES, TOKENS):
        _, num_heads, kv_heads, _ = MODELS[model]
        x = noise(tokens, (num_heads + 2 * kv_heads) * HEAD_DIM)
        q_norm, k_norm = noise(HEAD_DIM), noise(HEAD_DIM)
        angles = torch.rand(8192, HEAD_DIM // 2, device=CUDA) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        positions = torch.randint(8192, (tokens,), dtype=torch.int32, device=CUDA)
        caches = [torch.zeros(1025, 16, kv_heads, HEAD_DIM, dtype=DTYPE, device=CUDA) for _ in range(4)]
        slots = torch.randperm(1024 * 16, device=CUDA)[:tokens]
        q, k, v = x.view(tokens, -1, HEAD_DIM).tensor_split([num_heads, num_heads + kv_heads], dim=1)
        rotated = [
            reference.apply_rope(reference.rms_norm(part, weight, 1e-6), cos_sin[positions.long()])
            for part, weight in ((q, q_norm), (k, k_norm))
        ]
        reference.store_kv(rotated[1], v, caches[2], caches[3], slots)
        run = partial(qkv.rope_store_kv, x, q_norm, k_norm, 1e-6, cos_sin, positions, slots, caches[0], caches[1])
        pairs = [(run(), rotated[0]), (caches[0], caches[2]), (caches[1], caches[3])]
        table.add("rope_store_kv", model, tokens, run, pairs, 2 * x.nbytes)


def samplers(table: KernelTable) -> None:
    """The logits are read once, whatever the filter."""
    for (name, values), tokens in itertools.product(FILTERS.items(), SAMPLED):
        logits = noise(tokens, VOCAB, scale=2.0)
        rows = sampling_rows(tokens, CUDA, torch.randint(2**62, (tokens,)), **values)
        slots = torch.arange(tokens, device=CUDA)
        positions = torch.randint(2000, (tokens,), dtype=torch.int32, device=CUDA)
        pairs = [
            (sampling.sample(peaked, rows, slots, positions), reference_sample(peaked, rows, positions))
            for peaked in (logits, 4 * logits)
        ]
        run = partial(sampling.sample, logits, rows, slots, positions)
        table.add("sample", name, tokens, run, pairs, logits.nbytes)


def experts(table: KernelTable) -> None:
    """Qwen3-30B-A3B: 128 experts of width 768, 8 of them a token."""
    dim, width, number, top_k = 2048, 768, 128, 8
    router = noise(number, dim, scale=dim**-0.5)
    gate_up = noise(number, 2 * width, dim, scale=dim**-0.5)
    down = noise(number, dim, width, scale=width**-0.5)
    for tokens in TOKENS:
        x = noise(tokens, dim)
        arguments = (x, router, gate_up, down, top_k, True)
        hit = len(set(torch.nn.functional.linear(x, router).topk(top_k).indices.flatten().tolist()))
        moved = hit * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes
        pair = moe.moe(*arguments), reference.moe(*arguments)
        flops = 2 * tokens * top_k * 3 * width * dim
        table.add("moe", "30B-A3B", tokens, partial(moe.moe, *arguments), [pair], moved, flops)


KERNELS = {"norm": norms, "activation": activations, "qkv": heads, "sampling": samplers, "moe": experts}


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Check, time and print; 1 when a kernel is not its reference's."""
    parser = Parser(prog="minisgl bench kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--check", action="store_true", help="no timing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    require_gpu()
    torch.manual_seed(0)
    table = KernelTable(not options.check)
    for kernel in options.only:
        KERNELS[kernel](table)
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=1))
    return int(any(row["error"] > TOLERANCE for row in table.rows))
