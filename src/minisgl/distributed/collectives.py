"""A rank of a tensor-parallel group and its collectives: NCCL between GPUs, gloo between CPUs."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from minisgl.config import bind_gloo_to_loopback
from minisgl.errors import ConfigError

T = TypeVar("T")
START_TIMEOUT = timedelta(minutes=30)  # of a collective on the CPU: another rank may load weights from a slow disk
TEXT_BYTES = 4096
TOLERANCE = 0.05  # of an all-reduce of a few numbers of order one in 16 bits, relative to the largest result


class Collectives(Protocol):
    """Called by every rank in the same order with tensors of the same shape. GPU graphs may capture them."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each. Overwrites x, which may be what is returned."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, which is contiguous -> (size, *x.shape)."""

    def abort(self) -> None:
        """Stop waiting for a rank that is gone. The collectives cannot be used afterwards."""

    def close(self) -> None:
        """Leave the group, in which every rank is still alive."""


@dataclass
class TPGroup:
    rank: int
    size: int
    collectives: Collectives  # of the device's tensors; faster ones may take their place while the ranks start
    control: Collectives  # of the CPU's, while the ranks start
    one_host: bool = True  # all ranks run on one

    def least(self, number: int) -> int:
        return int(self.control.all_gather(torch.tensor([number], dtype=torch.int64)).min())

    def barrier(self) -> None:
        self.least(0)

    def abort(self) -> None:
        self.collectives.abort()


class TorchCollectives:
    """Collectives of torch.distributed's default group, on tensors of the CPU or of this process' GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.device = device
        self._aborted = False
        # The newer of two names; the older one warns where both exist.
        self._gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size * len(x), *x.shape[1:]))
        if x.numel():
            self._gather(out, x)
        return out.view(self.size, *x.shape)

    def abort(self) -> None:
        """Stop NCCL's kernels; gloo notices by itself. In a thread, since NCCL may wait for captured graphs."""
        if self.device.type == "cuda" and not self._aborted and dist.is_initialized():
            self._aborted = True
            threading.Thread(target=distributed_c10d._abort_process_group, name="minisgl-abort", daemon=True).start()

    def close(self) -> None:
        """Leave the group. A captured graph that still holds one of its collectives would make NCCL wait for ever."""
        if not self._aborted and dist.is_initialized():
            dist.destroy_process_group()


class NcclCollectives:
    """Collectives on a GPU's current stream by NVIDIA's bindings of NCCL, the package nccl4py."""

    def __init__(self, group: TPGroup) -> None:
        import nccl.core as nccl

        self._base = group.collectives
        self._size = group.size
        own = nccl.get_unique_id().as_bytes.hex() if group.rank == 0 else ""
        unique = nccl.UniqueId.from_bytes(bytes.fromhex(broadcast_text(group, own)))
        self._sum: Any = nccl.SUM
        self._communicator: Any = nccl.Communicator.init(group.size, group.rank, unique)

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel():
            self._communicator.allreduce(x, x, self._sum, stream=torch.cuda.current_stream().cuda_stream)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty((self._size, *x.shape))
        if x.numel():
            self._communicator.allgather(x, out, stream=torch.cuda.current_stream().cuda_stream)
        return out

    def abort(self) -> None:
        self._base.abort()
        self._communicator.abort()

    def close(self) -> None:
        self._communicator.destroy()
        self._base.close()


def join_group(rank: int, size: int, rendezvous: str, device: torch.device, one_host: bool = True) -> TPGroup:
    """Join the other ranks at `rendezvous`, an init_method of torch.distributed, and wait until all are there.

    `device` is this process' own, `cuda:i` or `cpu`. Raises ConfigError in a process that is in a group already.
    """
    if dist.is_initialized():
        raise ConfigError("torch.distributed is in use in this process already; it can be in one group of ranks only")
    if one_host:
        bind_gloo_to_loopback()
    backend, own = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, rendezvous, START_TIMEOUT, world_size=size, rank=rank, device_id=own)
    group = TPGroup(rank, size, TorchCollectives(size, device), TorchCollectives(size, torch.device("cpu")), one_host)
    group.barrier()
    return group


def broadcast_text(group: TPGroup, text: str) -> str:
    raw = text.encode()
    assert len(raw) <= TEXT_BYTES
    padded = torch.tensor(list(raw.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)
    return bytes(group.control.all_gather(padded)[0].tolist()).rstrip(b"\0").decode()


def attempt(group: TPGroup, work: Callable[[], T]) -> tuple[T | None, str]:
    """What `work` returns if it succeeds on every rank; else None, and the reason."""
    failure = ""
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if group.least(0 if failure else 1):
        return result, ""
    return None, failure or "it failed on another rank"


def select_nccl(group: TPGroup, device: torch.device, disable_pynccl: bool) -> tuple[Collectives, str]:
    """nccl4py's collectives where that is installed on every rank and works, else the group's; and what they are."""
    through_torch = "NCCL through torch.distributed"
    if disable_pynccl:
        return group.collectives, through_torch
    installed = find_spec("nccl") is not None and find_spec("nccl.core") is not None
    if not group.least(int(installed)):
        return group.collectives, f"{through_torch} (nccl4py is not installed)"

    def bind() -> NcclCollectives:
        bound, x = NcclCollectives(group), noise(group.rank, 8, 1024, torch.bfloat16, device)
        expect_close(bound.all_reduce(x.clone()), group.collectives.all_reduce(x), "an all-reduce")
        return bound

    bound, why = attempt(group, bind)
    if bound is None:
        return group.collectives, f"{through_torch} (nccl4py: {why})"
    return bound, "NCCL through nccl4py"


def noise(seed: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, columns, device=device, generator=generator).to(dtype)


def expect_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise RuntimeError with the largest difference when it is too large. Waits for the device."""
    difference = float((found.float() - expected.float()).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.float().abs().max())):
        raise RuntimeError(f"{what} is off by {difference}")
