"""The GEMMs of a decode step: cuBLAS against our own, for the large weights that steps of few rows stream.

    minisgl bench gemm                             Qwen3-14B, and a quarter of Qwen3-32B, at some rows
    minisgl bench gemm --model 14B/2 --rows 64 96

Figures are microseconds a layer, by the median replay of a CUDA graph over layers whose weights are their own, so that
they come from the GPU's memory. A layer is norm, QKV, a norm in place of attention, output, norm, gate and up with
`silu_mul`, down. `cublas` is torch's GEMM, `ours` what the engine takes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl.cli import Parser
from minisgl.core.ops import Operations
from minisgl.gpu.kernels import elementwise
from minisgl.gpu.operations import fused_operations
from minisgl_bench.gpu_timing import HEAD_DIM, MODELS, graph_us, noise, require_gpu
from minisgl_bench.report import hardware, versions

NAMES = ("qkv", "o", "gate_up", "down")
BYTES = 2 << 30
"""Of weights that a graph goes through at least."""
Gemm = Callable[[Tensor, Tensor], Tensor]


def layer_weights(model: str) -> dict[str, Tensor]:
    """Random weights of one layer of `14B`, or of `14B/2` for one of two ranks."""
    name, _, ranks = model.partition("/")
    size = int(ranks or 1)
    hidden, heads, kv_heads, width = MODELS[name]
    heads, kv_heads, width = heads // size, max(1, kv_heads // size), width // size
    sizes = {
        "qkv": ((heads + 2 * kv_heads) * HEAD_DIM, hidden),
        "o": (hidden, heads * HEAD_DIM),
        "gate_up": (2 * width, hidden),
        "down": (hidden, width),
    }
    return {name: noise(*size, scale=size[1] ** -0.5) for name, size in sizes.items()}


def cublas_gate_up(x: Tensor, weight: Tensor) -> Tensor:
    return elementwise.silu_mul(F.linear(x, weight))


def engine_gemms(ops: Operations) -> dict[str, Gemm]:
    kinds = {
        "qkv": ops.linear,
        "o": ops.row_parallel_linear,
        "gate_up": ops.gated_linear,
        "down": ops.row_parallel_linear,
    }
    return {name: partial(without_bias, kind) for name, kind in kinds.items()}


def without_bias(gemm: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    return gemm(x, weight, None)


def layer_microseconds(layers: Sequence[Mapping[str, Tensor]], rows: int, gemms: Mapping[str, Gemm]) -> float:
    hidden, width = layers[0]["o"].shape
    residual, gain = noise(rows, hidden), noise(max(hidden, width))

    def work() -> None:
        x = residual
        for layer in layers:
            qkv = gemms["qkv"](elementwise.add_rms_norm(x, residual, gain[:hidden], 1e-6), layer["qkv"])
            x = gemms["o"](elementwise.rms_norm(qkv[:, :width], gain[:width], 1e-6), layer["o"])
            normed = elementwise.add_rms_norm(x, residual, gain[:hidden], 1e-6)
            x = gemms["down"](gemms["gate_up"](normed, layer["gate_up"]), layer["down"])

    return graph_us(work, calls=1, replays=10) / len(layers)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench gemm", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["14B", "32B/4"], help="0.6B, 8B, 14B, 32B; or of n ranks: 32B/4")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 96])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    require_gpu()
    torch.manual_seed(0)
    cublas: dict[str, Gemm] = {**dict.fromkeys(NAMES, F.linear), "gate_up": cublas_gate_up}
    ours = engine_gemms(fused_operations(torch.device("cuda", torch.cuda.current_device())))
    results: dict[str, dict[int, dict[str, float]]] = {}
    for model in options.model:
        layers = [layer_weights(model)]
        size = sum(weight.nbytes for weight in layers[0].values())
        layers += [layer_weights(model) for _ in range(BYTES // size - 1)]
        print(f"{model}: {len(layers)} layers of {size / 1e6:.0f} MB, us a layer", flush=True)
        results[model] = {}
        for rows in options.rows:
            found = {"cublas": layer_microseconds(layers, rows, cublas), "ours": layer_microseconds(layers, rows, ours)}
            print(f"  {rows:4d} rows", *(f"{way} {time:.1f}" for way, time in found.items()), flush=True)
            results[model][rows] = found
    if options.json:
        report = {"hardware": hardware(), "versions": versions(), "microseconds": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0
