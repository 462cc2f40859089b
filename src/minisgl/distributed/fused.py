"""All-reduce, addition to the residual stream and norm in one kernel, and sampling from sharded logits.

For GPUs of one host that can write to each other's memory, in buffers of torch's symmetric memory; without multicast.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisgl.core.ops import Operations
from minisgl.core.quantization import Weight
from minisgl.core.sampler import SamplingRows
from minisgl.distributed.collectives import TPGroup, expect_close, noise
from minisgl.distributed.shard import VocabShard
from minisgl.errors import ConfigError
from minisgl.gpu.kernels import all_reduce
from minisgl.gpu.kernels.all_reduce import GENERATIONS, UNWRITTEN, ReceiveBuffers, buffer_size
from minisgl.gpu.kernels.sharded_sampling import Barrier, ShardedSampling, flags_size, partial_words

MAX_ROWS = 512  # tokens of a step up to which the kernels are used; NCCL does larger ones
# Bytes up to which one shot is faster than two, on H200s. In one shot each rank reads all of every other's rows and
# norms them all; in two it norms its share of the rows and sends the result to the others.
ONE_SHOT_BYTES, ONE_SHOT_BYTES_TWO_RANKS = 512 * 2**10, 2048 * 2**10
CHECKED_ROWS = (1, 5, 64, 256, 512)
EPS = 1e-6


def allocate(count: int, dtype: torch.dtype, device: torch.device, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    """A buffer of `count` elements, each `fill`, and the addresses of every rank's: int64 (size,) on the device.

    Every rank calls it with the same arguments.
    """
    from torch.distributed import _symmetric_memory as symmetric

    own: Tensor = symmetric.empty(count, dtype=dtype, device=device)
    own.fill_(fill)
    torch.cuda.synchronize(device)  # no other rank may write before it is filled
    assert dist.group.WORLD is not None
    handle: Any = symmetric.rendezvous(own, dist.group.WORLD.group_name)
    offset = own.data_ptr() - handle.buffer_ptrs[handle.rank]  # in an allocation; the same on every rank
    addresses = [address + offset for address in handle.buffer_ptrs]
    return own, torch.tensor(addresses, dtype=torch.int64, device=device)


class FusedNorm:
    """`add_rms_norm` of an all-reduce in one launch.

    After two shots a rank's residual stream is right only in the rows that the rank normed. So two shots serve forward
    passes that keep all their rows to the end; `begin` says whether the one that follows does.
    """

    def __init__(
        self, group: TPGroup, hidden: int, dtype: torch.dtype, device: torch.device, one_shot_bytes: int
    ) -> None:
        """Buffers of 3 * size times the bytes of one shot and, for two, 6 times those of MAX_ROWS; on every rank."""
        self.dtype = dtype
        self._whole = False
        one_shot = min(MAX_ROWS, one_shot_bytes // (hidden * dtype.itemsize))
        two_shot = 0 if one_shot == MAX_ROWS else MAX_ROWS
        share = -(-two_shot // group.size)

        def buffers(rows: int, *shapes: tuple[int, int]) -> ReceiveBuffers:
            counts = [max(1, buffer_size(*shape, hidden)) for shape in shapes]  # an empty buffer cannot be allocated
            own, addresses = zip(*(allocate(count, dtype, device, UNWRITTEN) for count in counts), strict=True)
            generations = torch.zeros(rows, dtype=torch.int32, device=device)
            return ReceiveBuffers(group.rank, group.size, rows, hidden, own, addresses, generations)

        self.one_shot = buffers(one_shot, (one_shot, group.size))
        self.two_shot = buffers(two_shot, (share, group.size), (two_shot, 1))

    def begin(self, whole: bool) -> None:
        """A forward pass begins; `whole`: the hidden states of all its tokens are wanted."""
        self._whole = whole

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        """residual += the sum of every rank's x; its norm. None, and nothing done, where NCCL is to be used."""
        rows = len(residual)
        one_shot = rows <= self.one_shot.rows
        if not rows or x.dtype != self.dtype or not (one_shot or (self._whole and rows <= self.two_shot.rows)):
            return None
        out = torch.empty_like(residual)
        if one_shot:
            all_reduce.one_shot_add_rms_norm(self.one_shot, x, residual, weight, eps, out)
        else:
            all_reduce.two_shot_add_rms_norm(self.two_shot, x, residual, weight, eps, out)
        return out

    def check(self, group: TPGroup, ops: Operations) -> None:
        """Raise RuntimeError where the kernels do not compute what an all-reduce and `ops.add_rms_norm` do."""
        device, hidden = self.one_shot.generations.device, self.one_shot.dim
        weight = torch.ones(hidden, dtype=self.dtype, device=device)
        self.begin(whole=True)
        for rows in CHECKED_ROWS:
            for call in range(GENERATIONS + 1):  # so that each buffer is used, and the first one again
                x = noise(group.size * call + group.rank, rows, hidden, self.dtype, device)
                found = self.add_rms_norm(x, torch.zeros_like(x), weight, EPS)
                if found is not None:
                    expected = ops.add_rms_norm(group.collectives.all_reduce(x), torch.zeros_like(x), weight, EPS, None)
                    expect_close(found, expected, f"the fused all-reduce of {rows} rows")


def fused_parallel_operations(
    plain: Operations, ops: Operations, group: TPGroup, hidden: int, shard: VocabShard, dtype: torch.dtype,
    device: torch.device, one_shot_bytes: int | None = None,
) -> Operations:  # fmt: skip
    """A rank's `plain` operations, with the kernels for steps that these have room for. `ops`: one device's.

    Allocates memory and checks the kernels; every rank calls this. Raises whatever makes them unusable here.
    """
    if device.type == "cuda":
        require_peers(group, device)
    if one_shot_bytes is None:
        one_shot_bytes = ONE_SHOT_BYTES_TWO_RANKS if group.size == 2 else ONE_SHOT_BYTES
    norm = FusedNorm(group, hidden, dtype, device, one_shot_bytes)
    norm.check(group, ops)
    own_flags, flags = allocate(flags_size(group.size), torch.int32, device)
    own_logits, logits = allocate(MAX_ROWS * shard.width, dtype, device)
    own_partials, partials = allocate(partial_words(MAX_ROWS, shard.width), torch.int32, device)
    sampling = ShardedSampling(
        barrier=Barrier(group.rank, group.size, own_flags, flags),
        vocab=shard.vocab, width=shard.width, rows=MAX_ROWS,
        own_logits=own_logits.view(MAX_ROWS, shard.width), own_partials=own_partials, logits=logits, partials=partials,
        gathered=torch.empty((MAX_ROWS, group.size * shard.width), dtype=dtype, device=device),
    )  # fmt: skip

    def embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
        norm.begin(whole)
        return plain.embed(ids, table, whole)

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Weight | None) -> Any:
        normed = norm.add_rms_norm(x, residual, weight, eps)
        return plain.add_rms_norm(x, residual, weight, eps, reader) if normed is None else normed

    def sample(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
        rows = len(logits)
        if not 0 < rows <= sampling.rows:
            return plain.sample(logits, table, slots, positions)
        sampling.own_logits[:rows].copy_(logits)
        return sampling.sample(rows, table, slots, positions)

    return dataclasses.replace(plain, embed=embed, add_rms_norm=add_rms_norm, sample=sample)


def require_peers(group: TPGroup, device: torch.device) -> None:
    """Raise ConfigError unless this GPU can reach the memory of the group's others."""
    if not group.one_host:
        raise ConfigError("the ranks are on several hosts")
    others = [gpu for gpu in range(torch.cuda.device_count()) if gpu != device.index][: group.size - 1]
    for gpu in others:
        if not torch.cuda.can_device_access_peer(device.index, gpu):
            raise ConfigError(f"GPU {device.index} cannot reach the memory of GPU {gpu}")
