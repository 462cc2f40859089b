"""The capture of a CUDA graph, as all of the engine's graphs are captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph, in the memory pool that this is the handle of, of what is launched until the end.

    It must have been launched once before, which compiles what it needs. Other threads may ask about events meanwhile:
    those that watch over collectives, or collect.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield graph
