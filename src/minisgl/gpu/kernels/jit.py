"""Triton's compiler as a typed decorator.

Programmatic dependent launch: a kernel starts while the one before it still runs, and waits only for its results.

From compute capability 9.0 on. Every kernel that is launched so must call `after_previous` before it touches anything
that another kernel writes or reads (CUDA programming guide, "Programmatic Dependent Launch and Synchronization").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
import triton.language as tl


class Kernel(Protocol):
    """A compiled function: a kernel when it is given a grid, a device function when another kernel calls it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """The launcher for this many programs along each axis."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Inline the function into the kernel that calls it."""


def jit(function: Callable[..., Any]) -> Kernel:
    """Compile a kernel at its first launch, once for each combination of constants, dtypes and alignments."""
    kernel: Kernel = triton.jit(function)
    return kernel


def jit_varying(*names: str) -> Callable[[Callable[..., Any]], Kernel]:
    """`jit` that compiles only once whatever these arguments are: token counts, and tensors that start anywhere.

    Otherwise whether an integer is 1 or a multiple of 16, and whether a tensor starts at one, makes another kernel, and
    the first step to meet it waits for the compiler.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        kernel: Kernel = triton.jit(function, do_not_specialize=list(names))
        return kernel

    return decorate


@functools.cache
def launch_options() -> dict[str, bool]:
    """What every launch adds: programmatic dependent launch where the card has it (see `pdl.py`)."""
    return {"launch_pdl": True} if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9 else {}


def warps_for(elements: int) -> int:
    """Warps, 1 to 16, that give each thread 8 elements (16 bytes of a 16-bit dtype) of a tile of a power of two."""
    return max(1, min(16, elements // (32 * 8)))


@jit
def after_previous(PDL: tl.constexpr) -> None:
    """Let the next kernel start, then wait until the one before this has ended and its writes are seen."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
