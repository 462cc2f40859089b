"""The matrix products of a decode step: cuBLAS against our own, for the large weights that steps of few rows stream.

    python benchmark/products.py                             Qwen3-14B, and a quarter of Qwen3-32B, at some rows
    python benchmark/products.py --model 14B/2 --rows 64 96
    python benchmark/products.py --sweep                     which cuts of `gpu/kernels/stream.py` are the fastest
    python benchmark/products.py --check                     no timing: each kernel against a product in float64

Figures are microseconds a layer, by the median replay of a CUDA graph over layers whose weights are their own, so that
they come from the card's memory. A layer is norm, QKV, a norm in place of attention, output, norm, gate and up with
`silu_mul`, down. `cublas` is torch's product, `ours` what the engine takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl.bench.report import hardware, versions
from minisgl.core.ops import Operations
from minisgl.gpu.kernels import activation, norm, stream
from minisgl.gpu.kernels.cuda import compile_all
from minisgl.gpu.kernels.stream import Cut, cut_for
from minisgl.gpu.operations import fused_operations

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
MODELS = {
    "0.6B": (1024, 16, 8, 3072),
    "8B": (4096, 32, 8, 14336),
    "14B": (5120, 40, 8, 17408),
    "32B": (5120, 64, 8, 25600),
}
"""Hidden size, heads, KV heads, MLP width."""
HEAD_DIM = 128
NAMES = ("qkv", "o", "gate_up", "down")
BYTES = 2 << 30
"""Of weights that a graph goes through at least."""
REPLAYS = 12
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A rank's part of a layer."""

    hidden: int
    heads: int
    kv_heads: int
    width: int

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of the weights, named as in the decoder."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * HEAD_DIM, self.hidden),
            "o": (self.hidden, self.heads * HEAD_DIM),
            "gate_up": (2 * self.width, self.hidden),
            "down": (self.hidden, self.width),
        }

    def weights(self) -> dict[str, Tensor]:
        """Random ones."""
        return {name: random(*size, scale=size[1] ** -0.5) for name, size in self.sizes().items()}


def random(*size: int, scale: float = 1.0) -> Tensor:
    """Normal noise."""
    return torch.randn(*size, device=DEVICE, dtype=DTYPE).mul_(scale)


def shape_of(name: str) -> Shape:
    """`14B`, or `14B/2` for one of two ranks."""
    model, _, ranks = name.partition("/")
    hidden, heads, kv_heads, width = MODELS[model]
    size = int(ranks or 1)
    return Shape(hidden, heads // size, max(1, kv_heads // size), width // size)


def cublas(name: str) -> Product:
    """torch's product."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        found = F.linear(x, weight)
        return activation.silu_mul(found) if name == "gate_up" else found

    return product


def ours(ops: Operations, name: str) -> Product:
    """What the engine takes."""
    return lambda x, weight: {"qkv": ops.linear, "gate_up": ops.gated}.get(name, ops.project)(x, weight, None)


def streamed(name: str, cut: Cut | None) -> Product:
    """Our kernel with this cut."""
    return partial(stream.gated_linear, cut=cut) if name == "gate_up" else partial(stream.linear, cut=cut)


def candidates(rows: int, columns: int) -> Iterator[Cut]:
    """Cuts worth trying for a weight of so many rows."""
    tokens = cut_for(rows, columns).tokens
    for sides, parts, resident in itertools.product((2, 4), (1, 2, 3, 4), (2, 3)):
        blocks = columns // stream.TILE * parts
        if tokens // sides >= 8 and sides * parts <= 8 and 75 <= blocks <= max(300, columns // stream.TILE):
            yield Cut(tokens, sides, parts, resident)


def time_graph(work: Callable[[], object]) -> float:
    """Microseconds of a replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            work()
        times = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


class Layers:
    """Layers of a shape, run one after the other."""

    def __init__(self, shape: Shape, least: int = BYTES) -> None:
        self.shape = shape
        size = sum(2 * columns * inner for columns, inner in shape.sizes().values())
        self.bytes = size
        self.layers = [shape.weights() for _ in range(max(1, least // size))]
        self.gain = random(8192)

    def microseconds(self, rows: int, products: dict[str, Product]) -> float:
        """A layer's time."""
        shape, gain = self.shape, self.gain
        residual = random(rows, shape.hidden)
        width = shape.heads * HEAD_DIM

        def work() -> None:
            x = residual
            for layer in self.layers:
                qkv = products["qkv"](norm.add_rms_norm(x, residual, gain[: shape.hidden], 1e-6), layer["qkv"])
                heads = norm.rms_norm(qkv[:, :width], gain[:width], 1e-6)
                x = products["o"](heads, layer["o"])
                hidden = norm.add_rms_norm(x, residual, gain[: shape.hidden], 1e-6)
                x = products["down"](products["gate_up"](hidden, layer["gate_up"]), layer["down"])

        return time_graph(work) / len(self.layers)


def sweep(layers: Layers, rows: int) -> tuple[float, dict[str, Cut]]:
    """The fastest cuts found one matrix after the other, twice around; microseconds a layer with them."""
    sizes = layers.shape.sizes()
    tries = {name: list(candidates(rows, sizes[name][0])) for name in NAMES}
    compile_all([stream.source(cut, name == "gate_up", DTYPE) for name in NAMES for cut in tries[name]])
    best = {name: tries[name][0] for name in NAMES}
    least = 0.0
    for turn, name in itertools.product(range(2), NAMES):
        times = []
        for cut in tries[name]:
            products = {other: streamed(other, cut if other == name else best[other]) for other in NAMES}
            times.append((layers.microseconds(rows, products), cut))
        times.sort()
        least, best[name] = times[0]
        if turn:
            print(f"    {name:8s}", *(f"{time:.1f} {tuple(cut)[1:]}" for time, cut in times), flush=True)
    return least, best


def check(weights: dict[str, Tensor], rows: int) -> float:
    """The largest ‖found - expected‖ / ‖expected‖ of our kernels, called twice: the same bits are asked for."""
    worst = 0.0
    for name, weight in weights.items():
        x = random(rows, weight.shape[1])
        product = x.double() @ weight.double().t()
        if name == "gate_up":
            gate, up = product.to(DTYPE).float().chunk(2, dim=1)
            product = (F.silu(gate).to(DTYPE).float() * up).double()
        tries = list(candidates(rows, len(weight)))
        compile_all([stream.source(cut, name == "gate_up", DTYPE) for cut in tries])
        for cut in tries:
            found, again = (streamed(name, cut)(x, weight) for _ in range(2))
            error = float((found.double() - product).norm() / product.norm())
            if not error < 1e-2 or not torch.equal(found, again):
                print(f"WRONG {name} rows {rows} {cut}: {error:.4f}, same {torch.equal(found, again)}", flush=True)
            worst = max(worst, error if error == error else 1e9)
    return worst


def main() -> None:
    """Check, measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["14B", "32B/4"], help="0.6B, 8B, 14B, 32B; or of n ranks: 32B/4")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 96])
    parser.add_argument("--check", action="store_true", help="no timing")
    parser.add_argument("--sweep", action="store_true", help="try all cuts")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    ops = fused_operations(torch.device("cuda", torch.cuda.current_device()))
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name in options.model:
        if options.check:
            weights = shape_of(name).weights()
            for rows in options.rows:
                print(f"{name} rows {rows}: error {check(weights, rows):.5f}", flush=True)
            continue
        layers = Layers(shape_of(name))
        results[name] = {}
        print(f"{name}: {len(layers.layers)} layers of {layers.bytes / 1e6:.0f} MB, us a layer", flush=True)
        for rows in options.rows:
            found = {
                way: layers.microseconds(rows, {n: make(n) for n in NAMES})
                for way, make in (("cublas", cublas), ("ours", partial(ours, ops)))
            }
            if options.sweep:
                found["swept"], cuts = sweep(layers, rows)
                print("   ", {n: tuple(cut) for n, cut in cuts.items()}, flush=True)
            print(f"  {rows:4d} rows", *(f"{way} {time:.1f}" for way, time in found.items()), flush=True)
            results[name][rows] = found
        del layers
    if options.json:
        report = {"hardware": hardware(), "versions": versions(), "microseconds": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
