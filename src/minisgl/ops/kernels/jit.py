"""Triton's compiler as a typed decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import triton


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


def warps_for(elements: int) -> int:
    """Warps, 1 to 16, that give each thread 8 elements (16 bytes of a 16-bit dtype) of a tile of a power of two."""
    return max(1, min(16, elements // (32 * 8)))
