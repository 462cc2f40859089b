"""GEMMs of a large weight with a few rows, at the GPU's memory bandwidth. Twins: `core.ops.linear` and `silu_mul`.

The kernel is CUDA C++ (`stream.cu`), since Triton lacks what it needs: the weight as `wgmma`'s 64-row operand, TMA
multicast within a cluster, and weight slabs on their way before the previous kernel has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisgl.gpu.kernels.cuda import MULTIPROCESSORS, CudaKernel, available, checked, compile_all, defines
from minisgl.gpu.kernels.linear import HALF, MAX_COLUMNS, MAX_WEIGHTS

TILE, SLAB = 64, 64  # rows of the weight that a block takes, and elements of each that are fetched together
TOKENS = (16, 32, 64, 96)  # rows of x that kernels are compiled for
MAX_ROWS = TOKENS[-1]  # above it cuBLAS is as fast
RING_BYTES = {2: 100 << 10, 3: 64 << 10}  # shared memory for slabs on their way, by thread blocks per multiprocessor
MAX_STAGES = 16


class StreamTile(NamedTuple):
    tokens: int  # rows of x
    sides: int  # tiles of a cluster, which share x
    splits: int  # of K
    resident: int = 2  # thread blocks per multiprocessor


def stream_tile_for(rows: int, columns: int) -> StreamTile:
    """The fastest measured on an H100, or nearly, for x (rows, K) and a weight (columns, K).

    Splits give each multiprocessor a thread block where they can. Blocks share the memory's bandwidth, so their number
    need not be a multiple; only a few blocks that run last, after all others have ended, cost time.
    """
    tokens = next(tokens for tokens in TOKENS if tokens >= rows)
    tiles = columns // TILE
    splits = next((splits for splits in (1, 2) if tiles * splits >= MULTIPROCESSORS - 2), 4)
    last = tiles * splits % (2 * MULTIPROCESSORS)
    return StreamTile(tokens, 2, splits, 3 if 0 < last < MULTIPROCESSORS // 2 < tiles * splits else 2)


def slab_bytes(tokens: int) -> int:
    return (TILE + tokens) * SLAB * 2


def stages(tile: StreamTile) -> int:
    """Slabs on their way at once."""
    return min(MAX_STAGES, RING_BYTES[tile.resident] // slab_bytes(tile.tokens))


def source(tile: StreamTile, gated: bool, dtype: torch.dtype) -> str:
    constants = defines(
        TOKENS=tile.tokens, SIDES=tile.sides, SPLITS=tile.splits, STAGES=stages(tile), GATED=gated,
        FLOAT16=dtype == torch.float16,
    )  # fmt: skip
    return constants + multiply_source(tile.tokens, dtype) + Path(__file__).with_name("stream.cu").read_text()


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
def kernel(tile: StreamTile, gated: bool, dtype: torch.dtype, device: torch.device) -> CudaKernel:
    """The kernel for a device. Those for other numbers of rows are compiled with it, as a decoder needs them all."""
    compile_all([source(tile._replace(tokens=tokens), gated, dtype) for tokens in TOKENS])
    with torch.cuda.device(device):
        shared = 1024 + stages(tile) * slab_bytes(tile.tokens)
        return CudaKernel(source(tile, gated, dtype), "stream_linear", shared)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels are the fastest for x (T, K) by weight (N, K), on a device that has them (`trial`)."""
    columns, inner = weight.shape
    if not 1 < len(x) <= MAX_ROWS or weight.numel() <= MAX_WEIGHTS or columns > MAX_COLUMNS:
        return False  # others are faster
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.is_contiguous()
    return x.dtype in HALF and inner % SLAB == 0 and columns % (2 * TILE) == 0 and aligned


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False, tile: StreamTile | None = None
) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N).

    With `gated`, which takes no bias: `silu_mul` of x by weight (2I, K), gate first, with its roundings -> (T, I).
    """
    (rows, inner), halves = x.shape, 2 if gated else 1
    columns = len(weight) // halves
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    tile = tile or stream_tile_for(rows, len(weight))
    assert rows <= tile.tokens
    # Eight rows of gate and eight of up alternate, so that a thread has both values of a column of the result.
    sizes, box = (inner, 8, halves, columns // 8), (SLAB, 8, halves, TILE // 8 // halves)
    weights = tensor_map(weight, sizes, (inner, columns * inner, 8 * inner), box)
    tokens = tensor_map(x, (inner, rows), (x.stride(0),), (SLAB, tile.tokens // tile.sides))
    clusters = -(-len(weight) // (TILE * tile.sides))
    kernel(tile, gated, x.dtype, x.device).launch(
        clusters * tile.sides * tile.splits, 128 + 32, (weights, tokens, out, bias, rows, columns, inner // SLAB)
    )
    return out


def trial(device: torch.device) -> str:
    """Try the kernels on a small GEMM -> why they cannot be used on this device, or ""."""
    if why := available(device):
        return why
    x, weight = (torch.randn(rows, 256, device=device).bfloat16() for rows in (5, 256))
    try:
        found, wanted = linear(x, weight).float(), x.float() @ weight.float().t()
        off = float((found - wanted).norm() / wanted.norm())
    except Exception as error:  # whatever it is, cuBLAS still works
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if off < 1e-2 else f"a GEMM was off by {off:.3f}"


def tensor_map(x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> Any:
    """A tensor map with which TMA reads a 16-bit tensor in boxes of swizzled rows of 128 bytes; zeros outside.

    `sizes`, `strides` and `box` in elements, innermost dimension first, whose stride of 1 is left out.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    half = x.dtype == torch.float16
    kind = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    layout = (
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride * x.element_size()) for stride in strides],
        [driver.cuuint32_t(extent) for extent in box],
        [driver.cuuint32_t(1)] * len(sizes),
    )
    modes = (
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return checked(driver.cuTensorMapEncodeTiled(kind, len(sizes), x.data_ptr(), *layout, *modes))
