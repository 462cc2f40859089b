"""The executor of a tensor-parallel group: every rank executes the same plans in the same order.

All sample the same tokens; only rank 0's are fetched. Plans are sent while the device runs the step before.

A rank's `row_parallel_linear` and `moe` leave its share of a sum; `add_rms_norm`, which alone reads it, all-reduces it.
Each rank has the logits of its own tokens only. To sample, all are gathered, and each rank samples as one device does.
"""

import atexit
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisgl.config import Config, Launcher
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec
from minisgl.core.ops import Operations
from minisgl.core.plan import Masks, StepPlan, StepResult
from minisgl.core.quantization import Weight
from minisgl.core.sampler import SamplingRows
from minisgl.core.weights import TORCH_DTYPES, Progress
from minisgl.distributed.collectives import TPGroup, attempt, join_group, select_nccl
from minisgl.distributed.messages import FinishStep, LaunchStep, LoadModel
from minisgl.distributed.shard import VocabShard, check_shards, local_spec, sharder, vocab_shard
from minisgl.distributed.worker_pool import WorkerPool
from minisgl.errors import ConfigError
from minisgl.gpu.attention.select import available_backends, capability, choose
from minisgl.gpu.executor import RankShare, attention_shape, build_local_executor
from minisgl.gpu.memory import require_pages_fit
from minisgl.gpu.operations import operations_for
from minisgl.system import flush_standard_streams


class GroupExecutor:
    """Runs plans on every rank. An error of any rank is raised by `collect`, or by the next `launch`."""

    def __init__(self, local: LocalExecutor, group: TPGroup, workers: WorkerPool, collectives: str) -> None:
        self.attention_choice = local.attention_choice
        self.kernels = local.kernels
        self.num_pages = local.num_pages
        self.collectives = collectives
        self.local = local
        self._group = group
        self._workers = workers

    def launch(self, plan: StepPlan) -> None:
        self._workers.check()
        self._workers.send(LaunchStep(plan))
        self.local.launch(plan)

    def finish(self, masks: Masks) -> None:
        self._workers.check()
        self._workers.send(FinishStep(masks))
        self.local.finish(masks)

    def collect(self) -> StepResult:
        with self._workers.name_the_cause():
            return self.local.collect()

    def close(self) -> None:
        """Wait for launched steps and end the workers; in a broken group, only end them."""
        if self._workers.broken and self.local.device.type == "cuda":
            self._workers.close()
            # Kernels may wait for ever for the rank that is gone, and freeing their memory would wait for them.
            atexit.register(os._exit, 1)
            atexit.register(flush_standard_streams)  # the last one registered is called first
            return
        try:
            self.local.close()
        finally:
            self._workers.close()
            self._group.collectives.close()


def build_group_executor(
    config: Config, folder: Path, spec: ModelSpec, max_seq_len: int, progress: Progress | None,
    launched: Launcher | None, on_failure: Callable[[], None] | None,
) -> GroupExecutor:  # fmt: skip
    """Rank 0's part of the start of a group of `config.tp`, whose workers torchrun started, or this function does.

    `config` is resolved; what it leaves to `auto` is decided here for all ranks. `on_failure` is called from another
    thread when a worker is gone. Raises ConfigError for what cannot be divided or does not fit, on any rank.
    """
    check_shards(spec, config.tp)
    share = local_spec(spec, config.tp)
    require_pages_fit(config, share)  # before workers start
    kind = torch.device(config.device)
    choice = choose(config.attn, attention_shape(share, config), available_backends(kind), capability(kind))
    config = config.replace(attn=f"{choice.prefill},{choice.decode}")
    device = torch.device("cpu" if config.device == "cpu" else f"cuda:{launched.local_rank if launched else 0}")
    use_device(device, launched.local_size if launched else config.tp)
    load = LoadModel(config, str(folder), max_seq_len)
    workers = WorkerPool(config.tp)
    if on_failure is not None:
        workers.on_failure(on_failure)
    group: TPGroup | None = None
    try:
        with workers.name_the_cause():
            if launched is None:
                rendezvous = workers.start(config.device)
                workers.send(load)
                group = join_group(0, config.tp, rendezvous, device)
            else:
                group = join_group(0, config.tp, "env://", device, launched.one_host)
                workers.accept(group)
                workers.send(load)
            workers.on_failure(group.abort)
            local, note = build_rank_executor(config, folder, spec, max_seq_len, group, progress, workers.check)
            group.barrier()  # every rank is ready
    except BaseException:
        workers.close(force=True)
        if group is not None:
            group.abort()
            group.collectives.close()
        raise
    local.attention_choice = local.attention_choice.replace("as asked for", choice.why)
    return GroupExecutor(local, group, workers, note)


def build_rank_executor(
    config: Config, folder: Path, spec: ModelSpec, max_seq_len: int, group: TPGroup,
    progress: Progress | None = None, alive: Callable[[], None] | None = None,
) -> tuple[LocalExecutor, str]:  # fmt: skip
    """One rank's executor over its share of the model, and a line that names its collectives; every rank calls this."""
    ops = operations_for(torch.device(config.device), spec.hidden_size)
    operations, note = select_collectives(config, group, spec, ops)
    share = RankShare(local_spec(spec, group.size), sharder(spec, group.rank, group.size), operations, group.least)
    return build_local_executor(config, folder, spec, max_seq_len, progress, share, alive), note


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

    def gather_logits(logits: Tensor) -> Tensor:  # (n, width) -> (n, V)
        parts = collectives.all_gather(logits.contiguous())
        return parts.transpose(0, 1).reshape(len(logits), -1)[:, : shard.vocab]

    def sample(logits: Tensor, table: SamplingRows, slots: Tensor, positions: Tensor) -> Tensor:
        return ops.sample(gather_logits(logits), table, slots, positions)

    return dataclasses.replace(
        ops,
        name=f"{ops.name}, {group.size} ranks",
        embed=embed,
        row_parallel_linear=ops.linear,
        add_rms_norm=add_rms_norm,
        gather_logits=gather_logits,
        sample=sample,
    )


def use_device(device: torch.device, ranks: int) -> None:
    """Make this the process' device; on the CPU, share the cores between the ranks of this host."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
