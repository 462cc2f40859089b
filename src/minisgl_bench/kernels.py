"""Microseconds of the fused kernels on this machine's GPU in bf16, at shapes of Qwen3: median replays of a CUDA graph.

Bytes are those that must move: inputs and outputs once, the weights of the experts that are hit. The GEMMs of a layer
are timed with its norms, over so many layers that weights come from the GPU's memory.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minisgl.cli import Parser
from minisgl.core.ops import Operations, RopeStore
from minisgl.core.sampler import SamplingRows
from minisgl.gpu.kernels import elementwise, moe, sampling
from minisgl.gpu.operations import fused_operations
from minisgl_bench.gpu_timing import CUDA, DTYPE, HEAD_DIM, VOCAB, graph_us, noise, print_figure, print_heading

# Of Qwen3: hidden size, heads, KV heads, MLP width.
MODELS = {
    "0.6B": (1024, 16, 8, 3072), "8B": (4096, 32, 8, 14336), "14B": (5120, 40, 8, 17408), "32B": (5120, 64, 8, 25600),
}  # fmt: skip
ROWS = (1, 8, 64, 256, 4096)
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T 0.6": {"temperature": 0.6},
    "top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p 0.1": {"temperature": 0.6, "min_p": 0.1},
}
GEMM_BYTES = 2 << 30  # of weights that a graph goes through at least
EPS = 1e-6
EXPERTS, EXPERT_WIDTH, TOP_K, EXPERT_HIDDEN = 128, 768, 8, 2048  # of Qwen3-30B-A3B
Gemm = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def elementwise_kernels(models: Sequence[str], rows: Sequence[int]) -> None:
    """Norms read the stream and a branch and write two, `silu_mul` writes half of its input, `rope_store_kv` all."""
    for model, tokens in itertools.product(models or ("0.6B", "14B"), rows or ROWS):
        dim, num_heads, kv_heads, width = model_shape(model)
        x, gate_up = noise(tokens, dim), noise(tokens, 2 * width)
        qkv = noise(tokens, (num_heads + 2 * kv_heads) * HEAD_DIM)
        angles = torch.rand(8192, HEAD_DIM // 2, device=CUDA) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        positions = torch.randint(8192, (tokens,), dtype=torch.int32, device=CUDA)
        slots = torch.randperm(1024 * 16, device=CUDA)[:tokens]
        caches = [torch.zeros(1025, 16, kv_heads, HEAD_DIM, dtype=DTYPE, device=CUDA) for _ in range(2)]
        weights = noise(HEAD_DIM), noise(HEAD_DIM)
        rope = RopeStore(elementwise.rope_store_kv, *weights, EPS, cos_sin, positions, slots, *caches)
        norm = partial(elementwise.add_rms_norm, x, noise(tokens, dim), noise(dim), EPS)
        print_figure("add_rms_norm", model, tokens, graph_us(norm), 4 * x.nbytes)
        print_figure("silu_mul", model, tokens, graph_us(partial(elementwise.silu_mul, gate_up)), 1.5 * gate_up.nbytes)
        print_figure("rope_store_kv", model, tokens, graph_us(partial(rope.operation, qkv, rope)), 2 * qkv.nbytes)


def samplers(models: Sequence[str], rows: Sequence[int]) -> None:
    for (name, values), tokens in itertools.product(FILTERS.items(), rows or ROWS[:-1]):
        logits = noise(tokens, VOCAB, scale=2.0)
        requests = SamplingRows(
            temperature=torch.full((tokens,), values["temperature"], device=CUDA),
            top_p=torch.full((tokens,), values.get("top_p", 1.0), device=CUDA),
            min_p=torch.full((tokens,), values.get("min_p", 0.0), device=CUDA),
            top_k=torch.full((tokens,), int(values.get("top_k", 0)), dtype=torch.int32, device=CUDA),
            seed=torch.randint(2**62, (tokens,), device=CUDA),
            min_len=torch.zeros(tokens, dtype=torch.int32, device=CUDA),
            stop_ids=torch.full((tokens, 32), -1, dtype=torch.int32, device=CUDA),
        )
        slots = torch.arange(tokens, device=CUDA)
        positions = torch.randint(2000, (tokens,), dtype=torch.int32, device=CUDA)
        us = graph_us(partial(sampling.sample, logits, requests, slots, positions))
        print_figure("sample", name, tokens, us, logits.nbytes)


def experts(models: Sequence[str], rows: Sequence[int]) -> None:
    router, gate_up, down = make_experts()
    for tokens in rows or ROWS:
        x = noise(tokens, EXPERT_HIDDEN)
        hit = len(set(F.linear(x, router).topk(TOP_K).indices.flatten().tolist()))
        moved = hit * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes
        us = graph_us(partial(moe.moe, x, router, gate_up, down, TOP_K, True))
        print_figure("moe", "30B-A3B", tokens, us, moved, 2 * tokens * TOP_K * 3 * EXPERT_WIDTH * EXPERT_HIDDEN)


def make_experts() -> tuple[Tensor, Tensor, Tensor]:
    """Of a layer: the router, gate and up, and down."""
    router = noise(EXPERTS, EXPERT_HIDDEN, scale=EXPERT_HIDDEN**-0.5)
    gate_up = noise(EXPERTS, 2 * EXPERT_WIDTH, EXPERT_HIDDEN, scale=EXPERT_HIDDEN**-0.5)
    return router, gate_up, noise(EXPERTS, EXPERT_HIDDEN, EXPERT_WIDTH, scale=EXPERT_WIDTH**-0.5)


def gemms(models: Sequence[str], rows: Sequence[int]) -> None:
    ops = fused_operations(torch.device("cuda", torch.cuda.current_device()))
    ways: dict[str, tuple[Gemm, Gemm, Gemm]] = {
        "cuBLAS": (F.linear, F.linear, lambda x, weight, bias: elementwise.silu_mul(F.linear(x, weight, bias))),
        "ours": gemms_of(ops),
    }
    for model in models or ("14B", "32B/4"):
        layers = make_layers(model)
        size = sum(weight.nbytes for weight in layers[0])
        for tokens, (way, calls) in itertools.product(rows or (1, 2, 8, 16, 32, 64, 96), ways.items()):
            us = layer_us(layers, tokens, *calls)
            print_figure(f"layer of GEMMs, {way}", model, tokens, us, size, size * tokens)


def gemms_of(ops: Operations) -> tuple[Gemm, Gemm, Gemm]:
    return ops.linear, ops.row_parallel_linear, lambda x, weight, bias: ops.gated_linear(x, weight, bias, None)


def model_shape(model: str) -> tuple[int, int, int, int]:
    """Hidden size, heads, KV heads and MLP width of `14B`, or of `14B/2` for one of two ranks."""
    name, _, ranks = model.partition("/")
    size = int(ranks or 1)
    hidden, num_heads, kv_heads, width = MODELS[name]
    return hidden, num_heads // size, max(1, kv_heads // size), width // size


def layer_shapes(model: str) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of a layer's GEMMs: QKV, output, gate and up, down."""
    hidden, num_heads, kv_heads, width = model_shape(model)
    queries = num_heads * HEAD_DIM
    return (queries + 2 * kv_heads * HEAD_DIM, hidden), (hidden, queries), (2 * width, hidden), (hidden, width)


def make_layers(model: str) -> list[list[Tensor]]:
    """The weights of the GEMMs of as many layers as have GEMM_BYTES."""
    shapes = layer_shapes(model)
    count = GEMM_BYTES // sum(outputs * inputs * DTYPE.itemsize for outputs, inputs in shapes)
    return [[noise(*shape, scale=shape[1] ** -0.5) for shape in shapes] for _ in range(count)]


def layer_us(layers: Sequence[Sequence[Tensor]], rows: int, linear: Gemm, to_norm: Gemm, gated: Gemm) -> float:
    """Microseconds a layer of `make_layers`; the result of `to_norm` is read by a norm alone."""
    hidden, queries = layers[0][1].shape
    residual, gain = noise(rows, hidden), noise(max(hidden, queries))

    def run() -> None:
        x = residual
        for qkv, output, gate_up, down in layers:
            heads = linear(elementwise.add_rms_norm(x, residual, gain[:hidden], EPS), qkv, None)
            x = to_norm(elementwise.rms_norm(heads[:, :queries], gain[:queries], EPS), output, None)
            x = to_norm(gated(elementwise.add_rms_norm(x, residual, gain[:hidden], EPS), gate_up, None), down, None)

    return graph_us(run, calls=1, replays=10) / len(layers)


KERNELS = {"elementwise": elementwise_kernels, "sampling": samplers, "moe": experts, "gemm": gemms}


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench kernels", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--model", nargs="+", default=(), help="of 0.6B, 8B, 14B, 32B; or of n ranks: 32B/4")
    parser.add_argument("--rows", type=int, nargs="+", default=(), help="tokens of a step")
    options = parser.parse_args(arguments)
    print_heading()
    for kernel in options.only:
        KERNELS[kernel](options.model, options.rows)
    return 0
