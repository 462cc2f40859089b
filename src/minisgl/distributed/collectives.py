"""A rank of a tensor-parallel group and what it can do together with the others.

Collectives through torch.distributed: gloo between CPUs, NCCL between GPUs; and how a process joins a group.

NCCL through NVIDIA's own Python bindings, the package nccl4py, without torch's process group in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from minisgl.errors import ConfigError


class Collectives(Protocol):
    """What all ranks do together, each calling the same in the same order. Captured in a CUDA graph on a GPU."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on each; x may be overwritten, and may be what is returned."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in the order of ranks -> (size, *x.shape). x is contiguous."""

    def abort(self) -> None:
        """Let go of whatever waits for a rank that is gone. The group is of no use afterwards."""

    def close(self) -> None:
        """Release what is held; every rank is still there."""


@dataclass(frozen=True)
class TPGroup:
    """Which rank this process is, of how many, and the collectives between them.

    `collectives` work on the device's tensors, `control` on the CPU's, while the ranks start. `one_host`: all ranks are
    processes of one host.
    """

    rank: int
    size: int
    collectives: Collectives
    control: Collectives
    one_host: bool = True

    def least(self, number: int) -> int:
        """The least of the ranks' numbers; none gets it before all have said theirs."""
        return int(self.control.all_gather(torch.tensor([number], dtype=torch.int64)).min())


START_TIMEOUT = timedelta(minutes=30)
"""For one rank to wait for another: the slowest disk decides how long weights take."""


class DistributedCollectives:
    """The default process group's collectives, on tensors of the CPU or of this process' GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self._aborted = False
        # The newer of the two names; the older one warns where both are there.
        self._gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in its place."""
        if x.numel():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in the order of ranks."""
        out = x.new_empty((self.size * len(x), *x.shape[1:]))
        if x.numel():
            self._gather(out, x)
        return out.view(self.size, *x.shape)

    def abort(self) -> None:
        """Stop NCCL's kernels; gloo notices by itself. Returns at once, for NCCL may wait for captured graphs."""
        if self.device.type == "cuda" and not self._aborted and dist.is_initialized():
            self._aborted = True
            threading.Thread(target=distributed_c10d._abort_process_group, name="minisgl-abort", daemon=True).start()

    def close(self) -> None:
        """Leave the group. No captured graph may hold one of its collectives any more: NCCL would wait for ever."""
        if not self._aborted and dist.is_initialized():
            dist.destroy_process_group()


def join_group(rank: int, size: int, rendezvous: str, device: torch.device, one_host: bool = True) -> TPGroup:
    """Meet the other ranks at `rendezvous`, an init_method of torch.distributed, and wait until all are there.

    `device` is this process' own, `cuda:i` or `cpu`. Raises ConfigError in a process that is in a group already.
    """
    if dist.is_initialized():
        raise ConfigError("torch.distributed is in use in this process already; one group of ranks can be there")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=rendezvous,
        rank=rank,
        world_size=size,
        timeout=START_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    control = DistributedCollectives(size, torch.device("cpu"))
    group = TPGroup(rank, size, DistributedCollectives(size, device), control, one_host)
    group.least(0)
    return group


def share_text(group: TPGroup, text: str, room: int = 4096) -> str:
    """What rank 0 says, on every rank."""
    words = torch.zeros(room, dtype=torch.uint8)
    raw = text.encode()
    assert len(raw) <= room
    words[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    return bytes(group.control.all_gather(words)[0].tolist()).rstrip(b"\0").decode()


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
