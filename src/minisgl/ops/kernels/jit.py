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
    """Warps that give each thread 8 elements of a tile, 16 bytes of a 16-bit dtype; from 1 to 16, a power of two."""
    return max(1, min(16, 1 << (elements // (32 * 8)).bit_length() - 1)) if elements >= 32 * 8 else 1
