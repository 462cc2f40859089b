"""NCCL through NVIDIA's own Python bindings, the package nccl4py, without torch's process group in between."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from minisgl.parallel.distributed import share_text
from minisgl.parallel.group import Collectives, TPGroup

TRIALS = 200
TRIAL_ELEMENTS = 64 * 5120
SLOWER = 1.05
"""Times torch's way that the bindings may take and still be preferred: two clocks never agree better."""


def available() -> bool:
    """Whether the package is installed."""
    return find_spec("nccl") is not None and find_spec("nccl.core") is not None


class NcclCollectives:
    """Collectives on a GPU's current stream through nccl4py; what torch's group does besides, it does still."""

    def __init__(self, group: TPGroup) -> None:
        """Every rank calls this; rank 0's id for the communicator goes to all through `group.control`."""
        import nccl.core as nccl

        self.base: Collectives = group.collectives
        self.size = group.size
        unique = nccl.get_unique_id().as_bytes.hex() if group.rank == 0 else ""
        shared = bytes.fromhex(share_text(group, unique))
        self._sum: Any = nccl.SUM
        self._communicator: Any = nccl.Communicator.init(group.size, group.rank, nccl.UniqueId.from_bytes(shared))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in its place."""
        if x.numel():
            self._communicator.allreduce(x, x, self._sum, stream=torch.cuda.current_stream().cuda_stream)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in the order of ranks."""
        out = x.new_empty((self.size, *x.shape))
        if x.numel():
            self._communicator.allgather(x, out, stream=torch.cuda.current_stream().cuda_stream)
        return out

    def abort(self) -> None:
        """Stop what runs, here and in torch's group."""
        self._communicator.abort()
        self.base.abort()

    def close(self) -> None:
        """Leave both groups."""
        self._communicator.destroy()
        self.base.close()


def seconds(collectives: Collectives, device: torch.device) -> float:
    """How long a sum of 64 rows of a large model takes, launched one by one as a prefill step does."""
    x = torch.zeros(TRIAL_ELEMENTS, dtype=torch.bfloat16, device=device)
    for _ in range(TRIALS // 10):
        collectives.all_reduce(x)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(TRIALS):
        collectives.all_reduce(x)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / TRIALS
