"""The decoder's operations on one rank of a group: the same, with sums over the ranks where a block ends.

`project` and `moe` leave this rank's part of a sum, and `add_rms_norm`, which alone reads it, adds the parts up. So the
decoder is the same on one device and on many.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from minisgl.ops.operations import Operations
from minisgl.ops.sampling import SamplingRows
from minisgl.parallel.group import Collectives, TPGroup
from minisgl.parallel.sampling import sample
from minisgl.parallel.shard import VocabShard


def embed_shard(ids: Tensor, table: Tensor, shard: VocabShard) -> Tensor:
    """Rows of this rank's tokens, zeros for the others': ids int32 (T,), table (width, D) -> (T, D)."""
    local = ids - shard.first
    mine = (local >= 0) & (local < shard.width)
    return table.index_select(0, torch.where(mine, local, 0)) * mine.unsqueeze(1)


def whole_logits(logits: Tensor, shard: VocabShard, ranks: Collectives) -> Tensor:
    """Every rank's columns beside each other: (n, width) -> (n, V)."""
    parts = ranks.all_gather(logits.contiguous())
    return parts.transpose(0, 1).reshape(len(logits), -1)[:, : shard.vocab]


def parallel_operations(ops: Operations, group: TPGroup, shard: VocabShard) -> Operations:
    """`ops` for a rank that holds `shard` of the vocabulary and its part of every other weight."""
    ranks = group.collectives

    def embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
        return ranks.all_reduce(embed_shard(ids, table, shard))

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return ops.add_rms_norm(ranks.all_reduce(x), residual, weight, eps)

    def choose(
        logits: Tensor,
        table: SamplingRows,
        slots: Tensor,
        positions: Tensor,
        all_greedy: bool,
        any_filter: bool,
        any_min_len: bool,
    ) -> Tensor:
        flags = {"all_greedy": all_greedy, "any_filter": any_filter, "any_min_len": any_min_len}
        if logits.device.type == "cpu":
            return sample(logits, table.select(slots), positions, shard, ranks, **flags)
        return ops.sample(whole_logits(logits, shard, ranks), table, slots, positions, *flags.values())

    return dataclasses.replace(
        ops,
        name=f"{ops.name}, {group.size} ranks",
        embed=embed,
        project=ops.linear,
        add_rms_norm=add_rms_norm,
        whole_logits=lambda logits: whole_logits(logits, shard, ranks),
        sample=choose,
    )
