"""Products of a large weight with a few rows, at the rate at which the card's memory gives the weight.

The kernel is CUDA C++ (`stream.cu`): it needs the weights in place of `wgmma`'s rows, the copy engine's multicast
within a cluster, and slabs of the weight on their way before the kernel ahead has ended, none of which Triton has.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minisgl.gpu.kernels.cuda import CudaKernel, available, compile_all, tensor_map
from minisgl.gpu.kernels.linear import MAX_WEIGHTS

TILE, SLAB = 64, 64
"""Rows of the weight that a block takes, and elements of each that are fetched and multiplied together."""
TOKENS = (16, 32, 64, 96)
"""Rows of x that kernels are compiled for; a product takes the least that holds its own."""
MAX_ROWS = TOKENS[-1]
"""Beyond them cuBLAS is as fast."""
MAX_COLUMNS = 1 << 17
"""Beyond are vocabularies."""
RING_BYTES = {2: 100 << 10, 3: 64 << 10}
"""Of slabs on their way, by how many blocks a multiprocessor shall hold: of one kernel, or of it and the next."""
MAX_STAGES = 16
MULTIPROCESSORS = 132
"""Of the cards that these kernels are for. Where there are fewer, nothing else is lost than a little time."""


class Cut(NamedTuple):
    """Rows of x, tiles that share what they fetch of x, parts of the inner dimension, blocks of a multiprocessor."""

    tokens: int
    sides: int
    parts: int
    resident: int = 2


def cut_for(rows: int, columns: int) -> Cut:
    """What was measured fastest, or nearly so, on an H100, for x of so many rows and a weight of so many.

    There is a block for each multiprocessor, if parts can make it so. Each block gets what it can of the memory's
    rate, so their number need not divide; only a few that come last, when all others have ended, do harm.
    """
    tokens = next(tokens for tokens in TOKENS if tokens >= rows)
    tiles = columns // TILE
    parts = next((parts for parts in (1, 2) if tiles * parts >= MULTIPROCESSORS - 2), 4)
    last = tiles * parts % (2 * MULTIPROCESSORS)
    return Cut(tokens, 2, parts, 3 if 0 < last < MULTIPROCESSORS // 2 < tiles * parts else 2)


def slab_bytes(tokens: int) -> int:
    """Of the weight and of x."""
    return (TILE + tokens) * SLAB * 2


def stages(cut: Cut) -> int:
    """Slabs that are on their way at once."""
    return min(MAX_STAGES, RING_BYTES[cut.resident] // slab_bytes(cut.tokens))


def source(cut: Cut, gated: bool, dtype: torch.dtype) -> str:
    """The kernel's text."""
    constants = {
        "TOKENS": cut.tokens,
        "SIDES": cut.sides,
        "PARTS": cut.parts,
        "STAGES": stages(cut),
        "GATED": int(gated),
        "FLOAT16": int(dtype == torch.float16),
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return defines + multiply_source(cut.tokens, dtype) + Path(__file__).with_name("stream.cu").read_text()


def multiply_source(tokens: int, dtype: torch.dtype) -> str:
    """`multiply`: d (64, tokens) = a (64, 16) b (tokens, 16)^T, plus d if `add`. Its registers are named one by one."""
    kind, count = "f16" if dtype == torch.float16 else "bf16", tokens // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ inline void multiply(float (&d)[{count}], unsigned long long a, unsigned long long b, int add) {{
    asm volatile(
        "{{ .reg .pred adds; setp.ne.b32 adds, %{count + 2}, 0;"
        " wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{kind}.{kind}"
        " {{{registers}}}, %{count}, %{count + 1}, adds, 1, 1, 0, 0; }}"
        : {outputs} : "l"(a), "l"(b), "r"(add));
}}
"""


@functools.cache
def kernel(cut: Cut, gated: bool, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """The kernel for a device. Those for other numbers of rows are compiled with it: a decoder has them all."""
    compile_all([source(cut._replace(tokens=tokens), gated, dtype) for tokens in TOKENS])
    with torch.cuda.device(device):
        shared = 1024 + stages(cut) * slab_bytes(cut.tokens)
        return CudaKernel(source(cut, gated, dtype), "stream_linear", shared)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x (T, K) by weight (N, K) is for these kernels, on a device that has them (`trial`)."""
    return (
        1 < len(x) <= MAX_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and weight.numel() > MAX_WEIGHTS
        and len(weight) <= MAX_COLUMNS
        and takes(x, weight)
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can do it at all."""
    columns, inner = weight.shape
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return inner % SLAB == 0 and columns % (2 * TILE) == 0 and aligned and weight.is_contiguous()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None, cut: Cut | None = None
) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N), contiguous and, where it is given, `out`."""
    if out is None:
        out = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, cut, gated=False)
    return out


def gated_linear(x: Tensor, weight: Tensor, cut: Cut | None = None) -> Tensor:
    """silu(x @ gate) * (x @ up), rounded where `silu_mul` rounds: x (T, K), weight (2I, K), gate first -> (T, I)."""
    out = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, None, out, cut, gated=True)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, cut: Cut | None, gated: bool) -> None:
    (rows, inner), columns, halves = x.shape, out.shape[1], 2 if gated else 1
    cut = cut or cut_for(rows, len(weight))
    assert rows <= cut.tokens
    assert out.is_contiguous()
    # Eight rows of the gate and eight of up in turns, so that a thread has both of a column of the result.
    weights = tensor_map(
        weight,
        (inner, 8, halves, columns // 8),
        (inner, columns * inner, 8 * inner),
        (SLAB, 8, halves, TILE // 8 // halves),
    )
    tokens = tensor_map(x, (inner, rows), (x.stride(0),), (SLAB, cut.tokens // cut.sides))
    clusters = -(-len(weight) // (TILE * cut.sides))
    kernel(cut, gated, x.dtype, x.device).launch(
        clusters * cut.sides * cut.parts, 128 + 32, (weights, tokens, out, bias, rows, columns, inner // SLAB)
    )


def trial(device: torch.device) -> str:
    """Try the kernels on a small product: what stands against them on this device, or nothing."""
    if why := available(device):
        return why
    x, weight = (torch.randn(rows, 256, device=device).bfloat16() for rows in (5, 256))
    try:
        found, wanted = linear(x, weight).float(), x.float() @ weight.float().t()
        off = float((found - wanted).norm() / wanted.norm())
    except Exception as error:  # whatever it is, cuBLAS does without
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if off < 1e-2 else f"a product was off by {off:.3f}"
