"""Collectives through torch.distributed: gloo between CPUs, NCCL between GPUs; and how a process joins a group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from minisgl.errors import ConfigError
from minisgl.parallel.group import TPGroup

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
