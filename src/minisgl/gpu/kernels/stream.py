"""GEMMs of a large weight with a few rows, at the GPU's memory bandwidth. Twins: `core.ops.linear` and `silu_mul`.

The kernel is CUDA C++ (`stream.cu`), since Triton lacks what it needs: the weight as `wgmma`'s 64-row operand, TMA
multicast within a cluster, and weight slabs on their way before the previous kernel has ended. NVRTC compiles it when
it is first needed, into the user's cache folder. NVRTC and the driver are called through the package cuda-bindings.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisgl.config import cache_folder
from minisgl.gpu.kernels.linear import HALF, MAX_WEIGHTS

TILE, SLAB = 64, 64  # rows of the weight that a block takes, and elements of each that are fetched together
TOKENS = (16, 32, 64, 96)  # rows of x that kernels are compiled for
MAX_ROWS = TOKENS[-1]  # above it cuBLAS is as fast
MAX_COLUMNS = 1 << 17  # larger weights are vocabularies
RING_BYTES = {2: 100 << 10, 3: 64 << 10}  # shared memory for slabs on their way, by thread blocks per multiprocessor
MAX_STAGES = 16
ARCHITECTURE = "sm_90a"  # wgmma exists on Hopper only
MULTIPROCESSORS = 132  # of an H100 or H200; on a GPU with fewer the tiles are only a little slower


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
    names = ("TOKENS", "SIDES", "SPLITS", "STAGES", "GATED", "FLOAT16")
    values = (tile.tokens, tile.sides, tile.splits, stages(tile), int(gated), int(dtype == torch.float16))
    defines = "".join(f"#define {name} {value}\n" for name, value in zip(names, values, strict=True))
    return defines + multiply_source(tile.tokens, dtype) + Path(__file__).with_name("stream.cu").read_text()


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: StreamTile | None = None) -> Tensor:
    """x (T, K) by weight (N, K), plus bias (N,) -> (T, N)."""
    return _launch(x, weight, bias, len(weight), tile)


def gated_linear(x: Tensor, weight: Tensor, tile: StreamTile | None = None) -> Tensor:
    """silu(x @ gate) * (x @ up), rounded where `silu_mul` rounds: x (T, K), weight (2I, K), gate first -> (T, I)."""
    return _launch(x, weight, None, len(weight) // 2, tile)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, columns: int, tile: StreamTile | None) -> Tensor:
    (rows, inner), halves = x.shape, len(weight) // columns
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    tile = tile or stream_tile_for(rows, len(weight))
    assert rows <= tile.tokens
    # Eight rows of gate and eight of up alternate, so that a thread has both values of a column of the result.
    sizes, box = (inner, 8, halves, columns // 8), (SLAB, 8, halves, TILE // 8 // halves)
    weights = tensor_map(weight, sizes, (inner, columns * inner, 8 * inner), box)
    tokens = tensor_map(x, (inner, rows), (x.stride(0),), (SLAB, tile.tokens // tile.sides))
    clusters = -(-len(weight) // (TILE * tile.sides))
    kernel(tile, halves == 2, x.dtype, x.device).launch(
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


def available(device: torch.device) -> str:
    """Why CUDA C++ kernels cannot be used on this device, as far as can be told without trying, or ""."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "they are for Hopper"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    return ""


def checked(answer: tuple[Any, ...]) -> Any:
    """The values of a call of the bindings, without its status. Raises RuntimeError unless that is success."""
    status, *values = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def cached_at(source: str) -> Path:
    from cuda.bindings import nvrtc

    version = checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(f"{version} {ARCHITECTURE} {source}".encode()).hexdigest()
    return Path(cache_folder()) / "kernels" / f"{key}.cubin"


def compile_source(source: str) -> bytes:
    """CUDA C++ -> machine code, from the cache folder if it is there. Raises RuntimeError with the compiler's log."""
    from cuda.bindings import nvrtc

    cached = cached_at(source)
    if cached.exists():
        return cached.read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status.value:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"NVRTC: {log.decode(errors='replace')}")
    code: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    with contextlib.suppress(OSError):  # a folder that cannot be written costs a compilation each time
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, cached)  # so that the file appears whole or not at all
    return code


def compile_all(sources: Sequence[str]) -> None:
    """Compile those that are not cached yet, in parallel: each takes about a second."""
    missing = [source for source in dict.fromkeys(sources) if not cached_at(source).exists()]
    if len(missing) > 1:
        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_source, missing))


class CudaKernel:
    """A kernel of one source, launched on the current stream of the current device with PDL (`jit.py`)."""

    def __init__(self, source: str, name: str, shared: int) -> None:
        """`shared`: bytes of dynamic shared memory. Raises RuntimeError when it cannot be compiled or loaded."""
        from cuda.bindings import driver

        self.driver, self.shared = driver, shared
        self.module = checked(driver.cuModuleLoadData(compile_source(source)))
        self.function = checked(driver.cuModuleGetFunction(self.module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(self.function, attribute, shared))
        self.dependent = driver.CUlaunchAttribute()
        self.dependent.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self.dependent.value.programmaticStreamSerializationAllowed = 1

    def launch(self, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Arguments are tensors, tensor maps, None for a null pointer, and integers, which are 32 bits long."""
        held = [_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(address for _, address in held))
        config = self.driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = [self.dependent], 1
        checked(self.driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


def _argument(argument: Any) -> tuple[Any, int]:
    """An object that holds an argument's bytes, and their address."""
    if isinstance(argument, Tensor) or argument is None:
        pointer = ctypes.c_void_p(0 if argument is None else argument.data_ptr())
        return pointer, ctypes.addressof(pointer)
    if isinstance(argument, int):
        number = ctypes.c_uint32(argument)
        return number, ctypes.addressof(number)
    return argument, int(argument.getPtr())


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
