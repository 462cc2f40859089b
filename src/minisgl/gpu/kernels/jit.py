"""Triton's compiler as a typed decorator, and programmatic dependent launch (PDL).

With PDL, on compute capability 9.0 and above, a kernel starts while the one before it still runs. Each kernel launched
so must call `after_previous` before it touches anything that another kernel writes or reads (CUDA programming guide,
"Programmatic Dependent Launch and Synchronization").
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import triton
import triton.language as tl


class Kernel(Protocol):
    """A compiled function: a kernel when it is given a grid, a device function when another kernel calls it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...

    def __call__(self, *args: Any, **options: Any) -> Any: ...


Decorator = Callable[[Callable[..., Any]], Kernel]
COMPILE_ONLY = ContextVar("compile_only", default=False)


class JitFunction(triton.JITFunction):  # type: ignore[misc]
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.run, grid=grid, warmup=COMPILE_ONLY.get())


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """In this block a launch has its kernel compiled, in a thread, and launches nothing: outputs stay as they are."""
    token = COMPILE_ONLY.set(True)
    try:
        with ThreadPoolExecutor() as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        COMPILE_ONLY.reset(token)


def jit_varying(*names: str) -> Decorator:
    """`jit` without specialisation on these arguments: token counts, and tensors at any address."""
    # Otherwise an integer that is 1 or a multiple of 16, or an aligned tensor, makes another kernel, and the first step
    # to meet it waits for the compiler.
    make: Any = triton.jit if triton.knobs.runtime.interpret else JitFunction
    return functools.partial(make, do_not_specialize=list(names))


jit: Decorator = jit_varying()  # compiles at the first launch of each combination of constants, dtypes and alignments


@functools.cache
def launch_options() -> dict[str, bool]:
    """What every launch of a kernel with a constant PDL adds: whether the GPU has it."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}


# Triton's own functions of these names are for kernels; on the host a call takes 1.4 µs, more than a launch may lose.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def warps_for(elements: int) -> int:
    """Warps, 1 to 16, so that each thread has 8 elements (16 bytes of a 16-bit dtype)."""
    return max(1, min(16, elements // (32 * 8)))


@jit
def after_previous(PDL: tl.constexpr) -> None:
    """Let the next kernel start, then wait until the previous one has ended and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def prefetch(
    weight: tl.tensor, row: tl.tensor, start: tl.tensor, inner: tl.tensor, ROWS: tl.constexpr, LENGTH: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows of a weight (N, inner), LENGTH elements of each from `start` on, into L2; a cache line has LINE."""
    lines = start + tl.minimum(tl.arange(0, LINES) * LINE, LENGTH - LINE)
    rows = row + tl.arange(0, ROWS)
    address = weight + rows[:, None].to(tl.int64) * inner + lines[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
