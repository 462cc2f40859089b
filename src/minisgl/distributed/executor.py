"""The executor for a tensor-parallel group: rank 0's own device, and word to the other ranks of every step.

Each rank executes the same plans in the same order and samples the same tokens; only rank 0's are fetched. A plan is
on its way before this rank starts with it, and all of that happens while the device runs the step before.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minisgl.config import Config, Launcher
from minisgl.core.executor import TORCH_DTYPES, LocalExecutor, attention_shape, build_local_executor
from minisgl.core.model_config import ModelSpec
from minisgl.core.plan import Masks, StepPlan, StepResult
from minisgl.distributed.collectives import TPGroup, join_group, share_text
from minisgl.distributed.messages import Assign, Finish, Launch
from minisgl.distributed.shard import check_shards, local_spec
from minisgl.distributed.worker_pool import Members
from minisgl.errors import MinisglError
from minisgl.gpu.attention.select import Choice, available_backends, capability, choose
from minisgl.gpu.memory import require_pages_fit


class GroupExecutor:
    """Runs plans on every rank of a group. An error of any rank is raised by `collect`, or by the next `launch`."""

    def __init__(self, local: LocalExecutor, group: TPGroup, members: Members) -> None:
        self.local = local
        self.group = group
        self.members = members
        self.attention_choice = local.attention_choice
        self.kernels = local.kernels
        self.collectives = "" if local.equipment is None else local.equipment.note

    @property
    def num_pages(self) -> int:
        """KV pages that every rank has."""
        return self.local.num_pages

    def launch(self, plan: StepPlan) -> None:
        """Start a step on every rank."""
        self.members.check()
        self.members.send(Launch(plan))
        self.local.launch(plan)

    def finish(self, masks: Masks) -> None:
        """Give the step launched last its masks on every rank."""
        self.members.check()
        self.members.send(Finish(masks))
        self.local.finish(masks)

    def collect(self) -> StepResult:
        """Wait for the oldest step. Raises EngineDeadError when a rank is gone."""
        try:
            return self.local.collect()
        except MinisglError:
            raise
        except Exception as error:
            raise self.members.blame(error) from error

    def close(self) -> None:
        """Wait for launched steps and end the other ranks; of a broken group, only end them.

        After a broken group of GPUs the process ends without tidying up, with status 1: what runs on the device may
        wait for ever for the rank that is gone, and whatever frees its memory would wait for that.
        """
        if self.members.broken and self.local.device.type == "cuda":
            self.members.close()
            atexit.register(leave)
            return
        try:
            self.local.close()
        finally:
            self.members.close()
            self.group.collectives.close()


def leave() -> None:
    """End the process at once, with what it had to say."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def build_group_executor(
    config: Config,
    folder: Path,
    spec: ModelSpec,
    max_seq_len: int,
    progress: bool,
    launched: Launcher | None,
    when_gone: Callable[[], None] | None,
) -> GroupExecutor:
    """Rank 0's part of the start of a group of `config.tp`, whose other ranks torchrun started, or this does.

    `config` is resolved, and what it leaves to `auto` is decided here for all ranks. `when_gone` is called from another
    thread when a rank is gone. Raises ConfigError for what cannot be divided or does not fit, on any rank.
    """
    check_shards(spec, config.tp)
    require_pages_fit(config, local_spec(spec, config.tp), TORCH_DTYPES[config.dtype])  # before other ranks start
    choice = choose_attention(config, spec)
    config = config.replace(attn=f"{choice.prefill},{choice.decode}")
    device = torch.device("cpu" if config.device == "cpu" else f"cuda:{launched.local_rank if launched else 0}")
    use_device(device, config.tp if launched is None else launched.local_size)
    group, members = meet_here(config, device) if launched is None else meet_launched(launched, device)
    if when_gone is not None:
        members.when_gone(when_gone)
    members.when_gone(group.collectives.abort)
    try:
        members.send(Assign(config, str(folder), max_seq_len))
        local = build_local_executor(config, folder, spec, max_seq_len, progress, group, members.check)
        group.least(0)  # every rank is ready
    except BaseException as error:
        failure = members.blame(error) if isinstance(error, Exception) else error
        members.close(at_once=True)
        group.collectives.abort()
        group.collectives.close()
        raise failure from None if failure is error else error
    assert local.equipment is not None
    group = local.equipment.group
    members.when_gone(group.collectives.abort)
    local.attention_choice = local.attention_choice.replace("as asked for", choice.why)
    return GroupExecutor(local, group, members)


def meet_here(config: Config, device: torch.device) -> tuple[TPGroup, Members]:
    """Start the other ranks on this host and meet them."""
    members, rendezvous = Members.start(config.tp, config.device)
    try:
        return join_group(0, config.tp, rendezvous, device), members
    except BaseException as error:
        failure = members.blame(error) if isinstance(error, Exception) else error
        members.close(at_once=True)
        raise failure from None if failure is error else error


def meet_launched(launched: Launcher, device: torch.device) -> tuple[TPGroup, Members]:
    """Meet ranks that torchrun started, on this host or others."""
    group = join_group(0, launched.size, "env://", device, launched.one_host)
    members = Members(launched.size, f"tcp://{launched.listen}:*")
    share_text(group, " ".join(members.addresses))
    members.wait()
    return group, members


def choose_attention(config: Config, spec: ModelSpec) -> Choice:
    """What `--attn` means here, for all ranks alike."""
    device = torch.device(config.device)
    shape = attention_shape(local_spec(spec, config.tp), config)
    return choose(config.attn, shape, available_backends(device), capability(device))


def use_device(device: torch.device, ranks: int) -> None:
    """Make this the process' device; on the CPU, share the cores between the ranks of this host."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
