"""What the card itself reaches, measured in about a second: reading, copying, and a large matrix product."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from minisgl.bench.ceilings import Ceilings
from minisgl.errors import ConfigError

SIDE: Final = 8192
BEYOND_L2: Final = 256 * 2**20
LARGEST: Final = 2 * 2**30
ROW: Final = 2**16


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of some runs each, in bytes/s and flop/s; products are of `dtype` and random normal.

    Raises ConfigError when the card has no memory left to measure in.
    """
    free = torch.cuda.mem_get_info(device)[0]
    size = min(LARGEST, free // 4 // (4 * ROW) * (4 * ROW))
    if size < BEYOND_L2:
        raise ConfigError(f"{free / 2**30:.2f} GiB are free, too little to measure the card; give --ceilings")
    try:
        return _measure(device, dtype, size)
    finally:
        torch.cuda.empty_cache()


def _measure(device: torch.device, dtype: torch.dtype, size: int) -> Ceilings:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    rows = source.view(-1, ROW)
    copy = 2 * size / _fastest(partial(target.copy_, source))
    read = size / min(_fastest(lambda: rows.sum(1)), _fastest(lambda: rows.amax(1)))
    a, b = (torch.randn((SIDE, SIDE), device=device).to(dtype) for _ in range(2))
    product = _fastest(lambda: torch.mm(a, b))
    return Ceilings(read=max(read, copy), flops=2 * SIDE**3 / product, copy=copy)


def _fastest(run: Callable[[], object], runs: int = 20) -> float:
    """Seconds of the fastest of some runs after two that warm up."""
    run()
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return min(milliseconds) / 1e3
