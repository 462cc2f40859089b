"""Kernels in CUDA C++: NVRTC compiles them when they are first needed, into the user's cache folder.

NVRTC and the driver are called through the package cuda-bindings.
"""

from __future__ import annotations

import contextlib
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

ARCHITECTURE = "sm_90a"  # wgmma exists on Hopper only
MULTIPROCESSORS = 132  # of an H100 or H200; on a GPU with fewer the tiles are only a little slower


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


def defines(**values: int) -> str:
    return "".join(f"#define {name} {int(value)}\n" for name, value in values.items())


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
