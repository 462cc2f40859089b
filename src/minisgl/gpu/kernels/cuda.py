"""CUDA C++ kernels beside Triton's: compiled by NVRTC when they are first needed, launched through the driver.

Both are reached through NVIDIA's Python bindings, the package cuda-bindings, which torch's CUDA builds bring along.
Compiled kernels are kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.config import cache_folder

ARCHITECTURE = "sm_90a"
"""Of Hopper, with what only Hopper has: these kernels run there alone."""


def available(device: torch.device) -> str:
    """What stands against such kernels on this device, as far as can be told without trying; nothing: ""."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "they are for Hopper"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed"
    return ""


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned beside its status, which raises RuntimeError unless it is success."""
    status, *values = answer
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def kept_at(source: str) -> Path:
    """Where the machine code of CUDA C++ is kept."""
    from cuda.bindings import nvrtc

    version = checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(f"{version} {ARCHITECTURE} {source}".encode()).hexdigest()
    return Path(cache_folder()) / "kernels" / f"{key}.cubin"


def compile_source(source: str) -> bytes:
    """CUDA C++ -> machine code, from the cache folder where it was compiled before.

    Raises RuntimeError with the compiler's words.
    """
    from cuda.bindings import nvrtc

    kept = kept_at(source)
    if kept.exists():
        return kept.read_bytes()
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
    keep(kept, code)
    return code


def compile_all(sources: Sequence[str]) -> None:
    """Compile those that are not kept yet, side by side: the compiler takes about a second for each."""
    missing = [source for source in dict.fromkeys(sources) if not kept_at(source).exists()]
    if len(missing) > 1:
        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_source, missing))


def keep(path: Path, code: bytes) -> None:
    """Write a file that appears whole or not at all; where the folder cannot be written it is made anew each time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        return


class CudaKernel:
    """A kernel of one source, launched on the current stream of the current device with dependent launch (`pdl.py`)."""

    def __init__(self, source: str, name: str, shared: int) -> None:
        """`shared`: bytes of dynamic shared memory. Raises RuntimeError when it cannot be compiled or loaded."""
        from cuda.bindings import driver

        self.driver = driver
        self.shared = shared
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
        config.attrs = [self.dependent]
        config.numAttrs = 1
        checked(self.driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


def _argument(argument: Any) -> tuple[Any, int]:
    """What holds an argument's bytes, and where they are."""
    if isinstance(argument, Tensor) or argument is None:
        pointer = ctypes.c_void_p(0 if argument is None else argument.data_ptr())
        return pointer, ctypes.addressof(pointer)
    if isinstance(argument, int):
        number = ctypes.c_uint32(argument)
        return number, ctypes.addressof(number)
    return argument, int(argument.getPtr())


def tensor_map(x: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> Any:
    """How the copy engine reads a 16-bit tensor: `cuTensorMapEncodeTiled`, boxes in rows of 128 bytes, swizzled.

    `sizes`, `strides` and `box` in elements, the innermost dimension first, whose stride is 1 and not named. What is
    outside reads as zero.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    return checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
            if x.dtype == torch.float16
            else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            x.data_ptr(),
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride * x.element_size()) for stride in strides],
            [driver.cuuint32_t(extent) for extent in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
