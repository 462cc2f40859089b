"""Check every fused kernel against its reference in bf16, then print its microseconds, on this machine's card.

    python benchmark/kernels.py                         all kernels, Qwen3-0.6B, 14B and 30B-A3B shapes
    python benchmark/kernels.py --only sampling moe     some of them
    python benchmark/kernels.py --check                 no timing

A figure is the median replay of a CUDA graph of 20 launches, divided by 20. Bytes are those that must move: inputs
once, outputs once, for the experts the weights of those that are hit. Small activations stay in L2, as in a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minisgl.core import ops as reference
from minisgl.core.sampler import SamplingRows
from minisgl.core.sampler import sample as reference_sample
from minisgl.gpu.kernels import activation, moe, norm, qkv, sampling

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
LAUNCHES = 20
TOKENS = (1, 8, 64, 256, 4096)
SAMPLED = (1, 8, 64, 256)
VOCAB = 151936
TOLERANCE = 1e-2
"""Allowed ‖out - reference‖ / ‖reference‖, bf16 rounding giving some 2e-3; of tokens, the share that may differ."""
MODELS = {"0.6B": (1024, 16, 8, 3072), "14B": (5120, 40, 8, 17408)}
"""Hidden size, heads, KV heads, MLP width."""
HEAD_DIM = 128
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T 0.6": {"temperature": 0.6},
    "top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p 0.1": {"temperature": 0.6, "min_p": 0.1},
}


@dataclass(frozen=True)
class Case:
    """A kernel at a shape: what to time, pairs of outputs that should agree, and the bytes and flops it is worth."""

    kernel: str
    shape: str
    tokens: int
    run: Callable[[], Tensor]
    pairs: Callable[[], list[tuple[Tensor, Tensor]]]
    bytes: int
    flops: int = 0


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal noise in the dtype under test."""
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).mul_(scale)


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, or the share of tokens that differ; infinite where a value is not finite."""
    if actual.dtype == torch.int32:
        return float((actual != expected).float().mean())
    value = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return value if value < float("inf") else float("inf")


def norms() -> Iterator[Case]:
    """The stream and the branch are read; the stream and the norm are written."""
    for model, (dim, _, _, _) in MODELS.items():
        for tokens in TOKENS:
            x, residual, weight = random(tokens, dim), random(tokens, dim), random(dim)

            def pairs(
                x: Tensor = x, residual: Tensor = residual, weight: Tensor = weight
            ) -> list[tuple[Tensor, Tensor]]:
                ours, theirs = residual.clone(), residual.clone()
                fused = norm.add_rms_norm(x, ours, weight, 1e-6), reference.add_rms_norm(x, theirs, weight, 1e-6)
                alone = norm.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
                return [fused, (ours, theirs), alone]

            run = partial(norm.add_rms_norm, x, residual, weight, 1e-6)
            yield Case("add_rms_norm", model, tokens, run, pairs, 4 * x.nbytes)


def activations() -> Iterator[Case]:
    """Gate and up are read, their product is written."""
    for model, (_, _, _, width) in MODELS.items():
        for tokens in TOKENS:
            gate_up = random(tokens, 2 * width)

            def pairs(gate_up: Tensor = gate_up) -> list[tuple[Tensor, Tensor]]:
                return [(activation.silu_mul(gate_up), reference.silu_mul(gate_up))]

            yield Case("silu_mul", model, tokens, partial(activation.silu_mul, gate_up), pairs, gate_up.nbytes * 3 // 2)


def heads() -> Iterator[Case]:
    """The product is read; queries, keys and values are written."""
    for model, (_, num_heads, kv_heads, _) in MODELS.items():
        for tokens in TOKENS:
            product = random(tokens, (num_heads + 2 * kv_heads) * HEAD_DIM)
            q_norm, k_norm = random(HEAD_DIM), random(HEAD_DIM)
            angles = torch.rand(8192, HEAD_DIM // 2, device=DEVICE) * 6
            cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
            positions = torch.randint(8192, (tokens,), dtype=torch.int32, device=DEVICE)
            caches = [torch.zeros(1025, 16, kv_heads, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in range(4)]
            locations = torch.randperm(1024 * 16, device=DEVICE)[:tokens]
            arguments = (product, q_norm, k_norm, 1e-6, cos_sin, positions, locations)

            def pairs(
                arguments: tuple[Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor] = arguments,
                caches: list[Tensor] = caches,
                num_heads: int = num_heads,
                kv_heads: int = kv_heads,
            ) -> list[tuple[Tensor, Tensor]]:
                product, q_norm, k_norm, eps, cos_sin, positions, locations = arguments
                parts = product.view(len(product), -1, HEAD_DIM)
                q, k, v = parts.tensor_split([num_heads, num_heads + kv_heads], dim=1)
                turned = [
                    reference.apply_rope(reference.rms_norm(part, weight, eps), cos_sin[positions.long()])
                    for part, weight in ((q, q_norm), (k, k_norm))
                ]
                reference.store_kv(turned[1], v, caches[2], caches[3], locations)
                actual = qkv.rope_store_kv(*arguments, caches[0], caches[1])
                return [(actual, turned[0]), (caches[0], caches[2]), (caches[1], caches[3])]

            run = partial(qkv.rope_store_kv, *arguments, caches[0], caches[1])
            yield Case("rope_store_kv", model, tokens, run, pairs, 2 * product.nbytes)


def samplers() -> Iterator[Case]:
    """The logits are read once, whatever the filter."""
    for name, values in FILTERS.items():
        for tokens in SAMPLED:
            logits = random(tokens, VOCAB, scale=2.0)
            table = sampling_table(tokens, values)
            slots = torch.arange(tokens, device=DEVICE)
            positions = torch.randint(2000, (tokens,), dtype=torch.int32, device=DEVICE)
            arguments = (logits, table, slots, positions)

            def pairs(
                arguments: tuple[Tensor, SamplingRows, Tensor, Tensor] = arguments,
            ) -> list[tuple[Tensor, Tensor]]:
                logits, table, slots, positions = arguments
                return [
                    (sampling.sample(peaked, table, slots, positions), reference_sample(peaked, table, positions))
                    for peaked in (logits, 4 * logits)
                ]

            yield Case("sample", name, tokens, partial(sampling.sample, *arguments), pairs, logits.nbytes)


def sampling_table(rows: int, values: dict[str, float]) -> SamplingRows:
    """A table whose rows all have these parameters and seeds of their own."""
    return SamplingRows(
        temperature=torch.full((rows,), values["temperature"], device=DEVICE),
        top_p=torch.full((rows,), values.get("top_p", 1.0), device=DEVICE),
        min_p=torch.full((rows,), values.get("min_p", 0.0), device=DEVICE),
        top_k=torch.full((rows,), int(values.get("top_k", 0)), dtype=torch.int32, device=DEVICE),
        seed=torch.randint(2**62, (rows,), device=DEVICE),
        min_len=torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        stop_ids=torch.full((rows, 32), -1, dtype=torch.int32, device=DEVICE),
    )


def experts() -> Iterator[Case]:
    """Qwen3-30B-A3B: 128 experts of width 768, 8 of them a token."""
    dim, width, number, top_k = 2048, 768, 128, 8
    router = random(number, dim, scale=dim**-0.5)
    gate_up = random(number, 2 * width, dim, scale=dim**-0.5)
    down = random(number, dim, width, scale=width**-0.5)
    for tokens in TOKENS:
        x = random(tokens, dim)
        arguments = (x, router, gate_up, down, top_k, True)
        hit = len(set(torch.nn.functional.linear(x, router).topk(top_k).indices.flatten().tolist()))
        moved = hit * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes

        def pairs(
            arguments: tuple[Tensor, Tensor, Tensor, Tensor, int, bool] = arguments,
        ) -> list[tuple[Tensor, Tensor]]:
            return [(moe.moe(*arguments), reference.moe(*arguments))]

        flops = 2 * tokens * top_k * 3 * width * dim
        yield Case("moe", "30B-A3B", tokens, partial(moe.moe, *arguments), pairs, moved, flops)


KERNELS = {"norm": norms, "activation": activations, "qkv": heads, "sampling": samplers, "moe": experts}


def microseconds(run: Callable[[], Tensor], replays: int = 30) -> float:
    """Median time of one launch inside a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            run()
    times: list[float] = []
    for _ in range(replays):
        start: torch.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: torch.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times[3:])


@torch.inference_mode()
def main() -> None:
    """Check, time and print; exits with 1 when a kernel is not its reference's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
    print(f"{'kernel':<14} {'shape':<21} {'T':>5} {'error':>9} {'µs':>8} {'GB/s':>6} {'TF/s':>5}")
    rows: list[dict[str, str | int | float]] = []
    wrong = False
    for kernel in args.only:
        for case in KERNELS[kernel]():
            worst = max(error(actual, expected) for actual, expected in case.pairs())
            time = 0.0 if args.check else microseconds(case.run)
            rate = (case.bytes / time / 1e3, case.flops / time / 1e6) if time else (0.0, 0.0)
            wrong |= worst > TOLERANCE
            mark = "  WRONG" if worst > TOLERANCE else ""
            print(
                f"{case.kernel:<14} {case.shape:<21} {case.tokens:>5} {worst:>9.1e} {time:>8.1f} {rate[0]:>6.0f} "
                f"{rate[1]:>5.0f}{mark}",
                flush=True,
            )
            rows.append({"kernel": case.kernel, "shape": case.shape, "tokens": case.tokens, "error": worst, "us": time})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if wrong:
        sys.exit("a kernel differs from its reference")


if __name__ == "__main__":
    main()
