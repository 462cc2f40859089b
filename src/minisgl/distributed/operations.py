"""Choosing tokens when each rank has the logits of its own tokens only, in plain torch.

Ranks exchange their best (logit, token) and, for rows with a filter, their highest logits and the sum of their
exponentials: from those every rank finds the same threshold, keeps its own tokens above it, and exchanges its best
score. Noise is a function of the token's id in the whole vocabulary, so the choice is that of one device, up to the
rounding of the logits. Only where a filter keeps more than a shard's FEW highest are all logits gathered, to find the
threshold.

The decoder's operations on one rank of a group: the same, with sums over the ranks where a block ends.

`project` and `moe` leave this rank's part of a sum, and `add_rms_norm`, which alone reads it, adds the parts up. So the
decoder is the same on one device and on many.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from minisgl.core.ops import Operations
from minisgl.core.sampler import FEW, SamplingRows, gumbel_noise, lowest_kept, mask_stop_ids
from minisgl.distributed.collectives import Collectives, TPGroup
from minisgl.distributed.shard import VocabShard


def sample(
    logits: Tensor,
    rows: SamplingRows,
    positions: Tensor,
    shard: VocabShard,
    ranks: Collectives,
    *,
    all_greedy: bool,
    any_filter: bool,
    any_min_len: bool,
) -> Tensor:
    """`ops.sampling.sample` of logits whose columns lie on several ranks: this one's (n, width) -> int32 (n,).

    Every rank calls it with the same rows and gets the same tokens. The host looks at how rows are filtered, so it is
    for the CPU.
    """
    if shard.real < shard.width:
        logits = logits.clone()
        logits[:, shard.real :] = float("-inf")
    if any_min_len:
        inside = (rows.stop_ids >= shard.first) & (rows.stop_ids < shard.first + shard.width)
        own = torch.where(inside, rows.stop_ids - shard.first, -1)
        logits = mask_stop_ids(logits, dataclasses.replace(rows, stop_ids=own), positions)
    highest, tokens = _best(logits.float(), shard, ranks)
    if all_greedy:
        return tokens
    random = torch.nonzero((rows.temperature != 0) & (rows.top_k != 1)).squeeze(1)
    if len(random):
        rows = rows.select(random)
        scaled = logits.index_select(0, random).float() - highest[random].unsqueeze(1)
        scaled /= rows.temperature.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        if any_filter:
            scaled = scaled.masked_fill(scaled < threshold(scaled, rows, shard, ranks), float("-inf"))
        noise = gumbel_noise(rows.seed, positions[random], shard.width, shard.first)
        tokens.index_copy_(0, random, _best(noise.add_(scaled), shard, ranks)[1])
    return tokens


def _best(values: Tensor, shard: VocabShard, ranks: Collectives) -> tuple[Tensor, Tensor]:
    """The highest of all ranks' float32 values (n, width), and its token, the lowest id among equals; both (n,)."""
    value, index = values.max(dim=-1)
    mine = torch.stack([value.view(torch.int32), index.int() + shard.first], dim=1)
    found = ranks.all_gather(mine)  # (size, n, 2)
    value = found[..., 0].contiguous().view(torch.float32)
    rank = value.argmax(dim=0, keepdim=True)
    return value.gather(0, rank).squeeze(0), found[..., 1].gather(0, rank).squeeze(0)


def threshold(scaled: Tensor, rows: SamplingRows, shard: VocabShard, ranks: Collectives) -> Tensor:
    """`ops.sampling.threshold` over all ranks' tokens: scaled float32 (n, width) -> (n, 1)."""
    by_min_p = rows.min_p.log().unsqueeze(1)
    mass = scaled.exp().sum(dim=-1, keepdim=True)
    for count in FEW:
        if count >= shard.width:
            break
        found = ranks.all_gather(torch.cat([scaled.topk(count, dim=-1).values, mass], dim=1))
        tops, total = found[..., :-1], found[..., -1:].sum(dim=0)
        floor = tops[..., -1].amax(dim=0)  # (n,) what lies above it on any rank is among the highest
        merged = torch.cat(list(tops), dim=1).sort(dim=-1, descending=True).values
        lowest, complete = lowest_kept(merged, total, rows, shard.vocab)
        unlimited = lowest == float("-inf")
        if bool((complete & (unlimited | (lowest >= floor))).all()):
            return torch.maximum(lowest.unsqueeze(1), by_min_p)
    whole = torch.cat(list(ranks.all_gather(scaled)), dim=1)[:, : shard.vocab]
    merged = whole.sort(dim=-1, descending=True).values
    lowest, _ = lowest_kept(merged, merged.exp().sum(dim=-1, keepdim=True), rows, shard.vocab)
    return torch.maximum(lowest.unsqueeze(1), by_min_p)


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
