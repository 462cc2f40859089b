"""What a rank works with: the fastest collectives that are there, each tried out before it is relied on.

Every rank goes the same way: what fails on one is left by all, and the choice is noted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec
from minisgl.core.ops import Operations
from minisgl.distributed.collectives import Collectives, TPGroup
from minisgl.distributed.operations import parallel_operations
from minisgl.distributed.overlap import OverlappedSums
from minisgl.distributed.shard import VocabShard, vocab_shard
from minisgl.errors import ConfigError

if TYPE_CHECKING:
    from minisgl.distributed.fused import FusedNorm, Fusion, SymmetricCollectives


T = TypeVar("T")
TRIAL_EPS = 1e-6
TOLERANCE = 0.05
"""By how much the sum of a few numbers of order one may differ in 16 bits, by the order of its terms."""


@dataclass(frozen=True)
class Equipment:
    """A group with the collectives chosen, the operations that use them, and why."""

    group: TPGroup
    operations: Operations
    note: str


def equip(config: Config, group: TPGroup, spec: ModelSpec, ops: Operations, dtype: torch.dtype) -> Equipment:
    """Choose collectives for the whole model `spec`, whose operations on one device are `ops`, and what hides sums.

    Raises ConfigError when what `config.all_reduce` asks for does not work here.
    """
    return overlap(config, choose(config, group, spec, ops, dtype), ops)


def choose(config: Config, group: TPGroup, spec: ModelSpec, ops: Operations, dtype: torch.dtype) -> Equipment:
    """Choose collectives, and make the operations that use them."""
    shard = vocab_shard(spec.vocab_size, group.rank, group.size)
    if config.device == "cpu":
        return Equipment(group, parallel_operations(ops, group, shard), "gloo")
    device = torch.device("cuda", torch.cuda.current_device())
    notes = []
    if not config.disable_pynccl:
        group, note = prefer_bindings(group, device)
        notes.append(note)
    else:
        notes.append("NCCL through torch.distributed")
    plain = parallel_operations(ops, group, shard)
    if config.all_reduce == "nccl":
        return Equipment(group, plain, notes[0])
    reached, why = attempt(group, lambda: reach(config, group, spec.hidden_size, dtype, device))
    if reached is None:
        if config.all_reduce != "auto":
            raise ConfigError(f"--all-reduce {config.all_reduce} does not work here: {why}")
        return Equipment(group, plain, f"{notes[0]}; no symmetric memory: {why}")
    notes.insert(0, f"sums through symmetric memory up to {reached.crossovers.two_shot // 1024} KiB, beyond")
    fusion: Fusion | None = None
    if config.all_reduce != "symmetric":
        fusion, why = attempt(group, lambda: fuse(group, reached, spec.hidden_size, ops, shard))
        if fusion is None and config.all_reduce == "fused":
            raise ConfigError(f"--all-reduce fused does not work here: {why}")
        notes.append("; in decode steps together with the norm" if fusion else f"; not together with the norm: {why}")
    group = dataclasses.replace(group, collectives=reached)
    plain = parallel_operations(ops, group, shard)
    return Equipment(group, stage(ops, plain, shard, reached, fusion), " ".join(notes).replace(" ;", ";"))


def attempt(group: TPGroup, work: Callable[[], T]) -> tuple[T | None, str]:
    """What `work` returns if it succeeds on every rank, or None, and why not."""
    failure = ""
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if group.least(0 if failure else 1):
        return result, ""
    return None, failure or "it failed on another rank"


def prefer_bindings(group: TPGroup, device: torch.device) -> tuple[TPGroup, str]:
    """The group with NCCL through nccl4py where that is there and not slower, else as it is."""
    from minisgl.distributed import collectives as pynccl

    usual = "NCCL through torch.distributed"
    if not group.least(int(pynccl.available())):
        return group, f"{usual} (nccl4py is not installed)"

    def bind() -> tuple[Collectives, float]:
        bound = pynccl.NcclCollectives(group)
        return bound, pynccl.seconds(bound, device)

    tried, why = attempt(group, bind)
    if tried is None:
        return group, f"{usual} (nccl4py: {why})"
    (bound, ours), theirs = tried, pynccl.seconds(group.collectives, device)
    figures = f"{ours * 1e6:.1f} us a sum against {theirs * 1e6:.1f}"
    if group.least(int(ours <= pynccl.SLOWER * theirs)):
        return dataclasses.replace(group, collectives=bound), f"NCCL through nccl4py ({figures})"
    return group, f"{usual} (nccl4py takes {figures})"


def reach(
    config: Config, group: TPGroup, hidden: int, dtype: torch.dtype, device: torch.device
) -> SymmetricCollectives:
    """Sums through symmetric memory, tried out; raises whatever stands against it."""
    from minisgl.distributed.fused import Stages, SymmetricCollectives, crossovers

    require_peers(group)
    limits = crossovers(config.all_reduce_crossovers, group.size)
    stages = Stages(max(limits.one_shot, limits.two_shot), dtype, device)
    collectives = SymmetricCollectives(group.collectives, stages, limits)
    try_sums(group.rank, group.collectives, collectives, hidden)
    return collectives


def fuse(group: TPGroup, collectives: SymmetricCollectives, hidden: int, ops: Operations, shard: VocabShard) -> Fusion:
    """Sums in one launch with the norm, tried out, and sampling from shards; raises whatever stands against it."""
    from minisgl.distributed.fused import make_fusion

    fusion = make_fusion(group, collectives, hidden, shard)
    try_norm(group.collectives, fusion.norm, ops, hidden)
    return fusion


def stage(
    ops: Operations, plain: Operations, shard: VocabShard, reached: SymmetricCollectives, fusion: Fusion | None
) -> Operations:
    """The operations that put their parts of sums where they are summed."""
    from minisgl.distributed.fused import staged_operations

    return staged_operations(ops, plain, shard, reached, fusion)


def overlap(config: Config, equipment: Equipment, ops: Operations) -> Equipment:
    """The same with sums of half a large step's rows hidden behind the other half's products.

    Sums that symmetric memory takes are too short to be worth it: they stay as they are.
    """
    from minisgl.distributed.fused import SymmetricCollectives

    if not config.all_reduce_overlap:
        return equipment
    ranks, beyond = equipment.group.collectives, 0
    if isinstance(ranks, SymmetricCollectives):
        beyond, ranks = ranks.stages.bytes, ranks.base
    device = torch.device("cpu") if config.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    sums = OverlappedSums(ranks, ops, config.all_reduce_overlap, beyond, device)
    return dataclasses.replace(equipment, operations=dataclasses.replace(equipment.operations, cut=sums.cut))


def require_peers(group: TPGroup) -> None:
    """Raise ConfigError unless every GPU of the group can reach this one's memory."""
    if not group.one_host:
        raise ConfigError("the ranks are on several hosts")
    own = torch.cuda.current_device()
    others = [card for card in range(torch.cuda.device_count()) if card != own][: group.size - 1]
    unreached = [card for card in others if not torch.cuda.can_device_access_peer(own, card)]
    if unreached:
        raise ConfigError(f"card {own} cannot reach the memory of card {unreached[0]}")


def try_sums(rank: int, trusted: Collectives, collectives: SymmetricCollectives, hidden: int) -> None:
    """Raise RuntimeError when a sum of any size class is not what the trusted collectives say."""
    own = collectives.stages.first.own
    for rows in (1, 8, 64, 512):
        x = noise(rank, rows, hidden, own)
        expect_close(collectives.all_reduce(x.clone()), trusted.all_reduce(x.clone()), f"a sum of {rows} rows")


def try_norm(
    trusted: Collectives, norm: FusedNorm, ops: Operations, hidden: int, sizes: Sequence[int] = (1, 5, 64, 256, 512)
) -> None:
    """Raise RuntimeError when fused sums, of each size in every generation, differ from a sum and a norm."""
    from minisgl.gpu.kernels.sums import GENERATIONS

    weight = torch.ones(hidden, dtype=norm.dtype, device=norm.one_shot.turns.device)
    norm.begin(whole=True)
    for rows in sizes:
        if rows > max(norm.one_shot.rows, norm.two_shot.rows):
            continue
        for call in range(GENERATIONS + 1):
            x = noise(norm.one_shot.world * call + norm.one_shot.rank, rows, hidden, weight)
            found = norm.add_rms_norm(x, torch.zeros_like(x), weight, TRIAL_EPS)
            assert found is not None
            expected = ops.add_rms_norm(trusted.all_reduce(x), torch.zeros_like(x), weight, TRIAL_EPS)
            expect_close(found, expected, f"the fused sum of {rows} rows")


def noise(seed: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Numbers of order one, other ones for every seed."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(rows, columns, device=like.device, generator=generator).to(like.dtype)


def expect_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise RuntimeError with the largest difference when it is too large. Waits for the device."""
    difference = float((found.float() - expected.float()).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.float().abs().max())):
        raise RuntimeError(f"{what} is off by {difference}")
