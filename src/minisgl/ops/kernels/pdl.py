"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits only for its results.

From compute capability 9.0 on. Every kernel that is launched so must call `after_previous` before it touches anything
that another kernel writes or reads (CUDA programming guide, "Programmatic Dependent Launch and Synchronization").
"""

from __future__ import annotations

import triton.language as tl

from minisgl.ops.kernels.jit import jit


@jit
def after_previous(PDL: tl.constexpr) -> None:
    """Let the next kernel start, then wait until the one before this has ended and its writes are seen."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
