"""The executor of a tensor-parallel group: every rank executes the same plans in the same order.

All sample the same tokens; only rank 0's are fetched. Plans are sent while the device runs the step before.
"""

import atexit
import os
from collections.abc import Callable
from pathlib import Path

import torch

from minisgl.config import Config, Launcher
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec
from minisgl.core.plan import Masks, StepPlan, StepResult
from minisgl.core.weights import Progress
from minisgl.distributed.collectives import TPGroup, join_group
from minisgl.distributed.messages import FinishStep, LaunchStep, LoadModel
from minisgl.distributed.operations import select_collectives
from minisgl.distributed.shard import check_shards, local_spec, sharder
from minisgl.distributed.worker_pool import WorkerPool
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
    sliced = sharder(spec, group.rank, group.size)
    share = RankShare(local_spec(spec, group.size), sliced, operations, group.least)
    return build_local_executor(config, folder, spec, max_seq_len, progress, share, alive), note


def use_device(device: torch.device, ranks: int) -> None:
    """Make this the process' device; on the CPU, share the cores between the ranks of this host."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
