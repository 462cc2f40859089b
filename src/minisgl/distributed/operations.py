"""The decoder's operations on one rank of a tensor-parallel group.

`row_parallel_linear` and `moe` leave this rank's share of a sum; `add_rms_norm`, which alone reads it, all-reduces it.

Each rank has the logits of its own tokens only. To sample, ranks exchange their highest (logit, token) and, for rows
with a filter, their highest logits and the sum of their exponentials. From those every rank finds the same threshold,
keeps its own tokens above it, and exchanges its best score. Noise is a function of the token id, so the token is that
of one device, up to the rounding of the logits. All logits are gathered only to find a threshold that keeps more than
a shard's FEW highest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec
from minisgl.core.ops import Operations
from minisgl.core.sampler import FEW, SamplingRows, gumbel_noise, lowest_kept, mask_stop_ids
from minisgl.distributed.collectives import Collectives, TPGroup, attempt, select_nccl
from minisgl.distributed.shard import VocabShard, vocab_shard
from minisgl.errors import ConfigError


@dataclass(frozen=True)
class SelectedCollectives:
    """A group with the collectives that were selected, the operations that use them, and a line that names them."""

    group: TPGroup
    operations: Operations
    note: str


def select_collectives(
    config: Config, group: TPGroup, spec: ModelSpec, ops: Operations, dtype: torch.dtype
) -> SelectedCollectives:
    """The fastest collectives that pass their check on every rank, for the whole model `spec`. `ops`: one device's.

    Raises ConfigError when what `config.all_reduce` names does not work here.
    """
    shard = vocab_shard(spec.vocab_size, group.rank, group.size)
    if config.device == "cpu":
        return SelectedCollectives(group, parallel_operations(ops, group, shard), "gloo")
    device = torch.device("cuda", torch.cuda.current_device())
    group, note = select_nccl(group, device, config.disable_pynccl)
    plain = parallel_operations(ops, group, shard)
    if config.all_reduce == "nccl":
        return SelectedCollectives(group, plain, note)
    from minisgl.distributed import fused as fused_kernels  # needs triton, which only GPUs do

    fused, why = attempt(group, lambda: fused_kernels.make_fused(group, ops, spec.hidden_size, shard, dtype, device))
    if fused is None:
        if config.all_reduce == "fused":
            raise ConfigError(f"--all-reduce fused does not work here: {why}")
        return SelectedCollectives(group, plain, f"{note}; not fused with the norm: {why}")
    operations = fused_kernels.fused_parallel_operations(plain, fused)
    note = f"fused with the norm up to {fused_kernels.MAX_ROWS} tokens, beyond {note}"
    return SelectedCollectives(group, operations, note)


def parallel_operations(ops: Operations, group: TPGroup, shard: VocabShard) -> Operations:
    """`ops` for a rank that holds `shard` of the vocabulary and its share of every other weight."""
    collectives = group.collectives

    def embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
        return collectives.all_reduce(embed_shard(ids, table, shard))

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return ops.add_rms_norm(collectives.all_reduce(x), residual, weight, eps)

    def sample_shards(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor, *flags: bool) -> Tensor:
        if logits.device.type == "cpu":
            return sample(logits, table.select(slots), positions, shard, collectives, *flags)
        return ops.sample(gather_logits(logits, shard, collectives), table, slots, positions, *flags)

    return dataclasses.replace(
        ops,
        name=f"{ops.name}, {group.size} ranks",
        embed=embed,
        row_parallel_linear=ops.linear,
        add_rms_norm=add_rms_norm,
        gather_logits=lambda logits: gather_logits(logits, shard, collectives),
        sample=sample_shards,
    )


def embed_shard(ids: Tensor, table: Tensor, shard: VocabShard) -> Tensor:
    """Rows of this rank's tokens, zeros for the others': ids int32 (T,), table (width, D) -> (T, D)."""
    local = ids - shard.first
    mine = (local >= 0) & (local < shard.width)
    return table.index_select(0, torch.where(mine, local, 0)) * mine.unsqueeze(1)


def gather_logits(logits: Tensor, shard: VocabShard, collectives: Collectives) -> Tensor:
    """The logits of all tokens, on every rank: (n, width) -> (n, V)."""
    parts = collectives.all_gather(logits.contiguous())
    return parts.transpose(0, 1).reshape(len(logits), -1)[:, : shard.vocab]


def sample(
    logits: Tensor, rows: SamplingRows, positions: Tensor, shard: VocabShard, collectives: Collectives,
    all_greedy: bool, any_filter: bool, any_min_len: bool,
) -> Tensor:  # fmt: skip
    """`core.sampler.sample` of sharded logits, of which this rank has (n, width) -> int32 (n,), the same on every rank.

    For the CPU: how rows are filtered is read on the host.
    """
    if shard.real < shard.width:
        logits = logits.clone()
        logits[:, shard.real :] = float("-inf")
    if any_min_len:
        inside = (rows.stop_ids >= shard.first) & (rows.stop_ids < shard.first + shard.width)
        own = torch.where(inside, rows.stop_ids - shard.first, -1)
        logits = mask_stop_ids(logits, dataclasses.replace(rows, stop_ids=own), positions)
    highest, tokens = _best(logits.float(), shard, collectives)
    if all_greedy:
        return tokens
    random = torch.nonzero((rows.temperature != 0) & (rows.top_k != 1)).squeeze(1)
    if len(random):
        rows = rows.select(random)
        scaled = logits.index_select(0, random).float() - highest[random].unsqueeze(1)
        scaled /= rows.temperature.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        if any_filter:
            scaled = scaled.masked_fill(scaled < threshold(scaled, rows, shard, collectives), float("-inf"))
        noise = gumbel_noise(rows.seed, positions[random], shard.width, shard.first)
        tokens.index_copy_(0, random, _best(noise.add_(scaled), shard, collectives)[1])
    return tokens


def _best(values: Tensor, shard: VocabShard, collectives: Collectives) -> tuple[Tensor, Tensor]:
    """The highest of all ranks' float32 values (n, width), and the lowest token id that has it; both (n,)."""
    value, index = values.max(dim=-1)
    mine = torch.stack([value.view(torch.int32), index.int() + shard.first], dim=1)
    found = collectives.all_gather(mine)  # (size, n, 2)
    value = found[..., 0].contiguous().view(torch.float32)
    rank = value.argmax(dim=0, keepdim=True)
    return value.gather(0, rank).squeeze(0), found[..., 1].gather(0, rank).squeeze(0)


def threshold(scaled: Tensor, rows: SamplingRows, shard: VocabShard, collectives: Collectives) -> Tensor:
    """`core.sampler.threshold` over all ranks' tokens: scaled float32 (n, width) -> (n, 1)."""
    by_min_p = rows.min_p.log().unsqueeze(1)
    mass = scaled.exp().sum(dim=-1, keepdim=True)
    for count in FEW:
        if count >= shard.width:
            break
        found = collectives.all_gather(torch.cat([scaled.topk(count, dim=-1).values, mass], dim=1))
        tops, total = found[..., :-1], found[..., -1:].sum(dim=0)
        floor = tops[..., -1].amax(dim=0)  # (n,): what is above it on any rank is among the candidates
        merged = torch.cat(list(tops), dim=1).sort(dim=-1, descending=True).values
        lowest, complete = lowest_kept(merged, total, rows, shard.vocab)
        unlimited = lowest == float("-inf")
        if bool((complete & (unlimited | (lowest >= floor))).all()):
            return torch.maximum(lowest.unsqueeze(1), by_min_p)
    whole = torch.cat(list(collectives.all_gather(scaled)), dim=1)[:, : shard.vocab]
    merged = whole.sort(dim=-1, descending=True).values
    lowest, _ = lowest_kept(merged, merged.exp().sum(dim=-1, keepdim=True), rows, shard.vocab)
    return torch.maximum(lowest.unsqueeze(1), by_min_p)
