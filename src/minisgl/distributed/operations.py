"""The decoder's operations on one rank of a tensor-parallel group.

`row_parallel_linear` and `moe` leave this rank's share of a sum; `add_rms_norm`, which alone reads it, all-reduces it.
Each rank has the logits of its own tokens only. To sample, all are gathered, and each rank samples as one device does.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec
from minisgl.core.ops import Operations
from minisgl.core.quantization import Weight
from minisgl.core.sampler import SamplingRows
from minisgl.core.weights import TORCH_DTYPES
from minisgl.distributed.collectives import Collectives, TPGroup, attempt, select_nccl
from minisgl.distributed.shard import VocabShard, vocab_shard
from minisgl.errors import ConfigError


def select_collectives(config: Config, group: TPGroup, spec: ModelSpec, ops: Operations) -> tuple[Operations, str]:
    """Give the group the fastest collectives that pass their check on every rank, for the whole model `spec`.

    Returns one device's `ops` with them, and a line that names them. Raises ConfigError when what `config.all_reduce`
    names does not work here.
    """
    shard = vocab_shard(spec.vocab_size, group.rank, group.size)
    if config.device == "cpu":
        return parallel_operations(ops, group, shard), "gloo"
    device = torch.device("cuda", torch.cuda.current_device())
    group.collectives, note = select_nccl(group, device, config.disable_pynccl)
    plain = parallel_operations(ops, group, shard)
    if config.all_reduce == "nccl":
        return plain, note
    from minisgl.distributed.fused import MAX_ROWS, fused_parallel_operations  # needs triton, which only GPUs do

    dtype, hidden = TORCH_DTYPES[config.dtype], spec.hidden_size
    fused, why = attempt(group, lambda: fused_parallel_operations(plain, ops, group, hidden, shard, dtype, device))
    if fused is not None:
        return fused, f"fused with the norm up to {MAX_ROWS} tokens, beyond {note}"
    if config.all_reduce == "fused":
        raise ConfigError(f"--all-reduce fused does not work here: {why}")
    return plain, f"{note}; not fused with the norm: {why}"


def parallel_operations(ops: Operations, group: TPGroup, shard: VocabShard) -> Operations:
    """`ops` for a rank that holds `shard` of the vocabulary and its share of every other weight."""
    collectives = group.collectives

    def embed(ids: Tensor, table: Tensor, whole: bool) -> Tensor:
        local = ids - shard.first
        mine = (local >= 0) & (local < shard.width)  # rows of the table (width, D), zeros for others'
        return collectives.all_reduce(table.index_select(0, torch.where(mine, local, 0)) * mine.unsqueeze(1))

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Weight | None) -> Any:
        return ops.add_rms_norm(collectives.all_reduce(x), residual, weight, eps, reader)

    def sample(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
        return ops.sample(gather_logits(logits, shard, collectives), table, slots, positions)

    return dataclasses.replace(
        ops,
        name=f"{ops.name}, {group.size} ranks",
        embed=embed,
        row_parallel_linear=ops.linear,
        add_rms_norm=add_rms_norm,
        gather_logits=lambda logits: gather_logits(logits, shard, collectives),
        sample=sample,
    )


def gather_logits(logits: Tensor, shard: VocabShard, collectives: Collectives) -> Tensor:
    """The logits of all tokens, on every rank: (n, width) -> (n, V)."""
    parts = collectives.all_gather(logits.contiguous())
    return parts.transpose(0, 1).reshape(len(logits), -1)[:, : shard.vocab]
