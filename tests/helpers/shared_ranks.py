"""`python -m helpers.shared_ranks RANK SIZE FOLDER MODEL`: a rank whose kernels run in triton's interpreter.

Files that all ranks map stand in for symmetric memory, so that the kernels meet and reach each other's buffers as they
do on GPUs. Every rank runs an engine of its own over the same requests, and prints what it says as a line of JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from helpers.interpreter import quicken
from helpers.ranked import MAX_SEQ_LEN, SPECS, config, generate
from minisgl.config import Config
from minisgl.core.executor import build_local_executor
from minisgl.core.model_config import ModelSpec
from minisgl.core.ops import Operations
from minisgl.distributed import fused
from minisgl.distributed import fused as symmetric
from minisgl.distributed.collectives import TPGroup, join_group
from minisgl.distributed.fused import Buffer, Crossovers, Stages, SymmetricCollectives
from minisgl.distributed.operations import parallel_operations
from minisgl.distributed.overlap import OverlappedSums
from minisgl.distributed.select import Equipment, overlap, try_norm
from minisgl.distributed.shard import vocab_shard
from minisgl.gpu.kernels import sharded_sampling, sums
from minisgl.gpu.kernels.sharded_sampling import ShardedSampling

ONE_SHOT, TWO_SHOT = 3 * 128, 12 * 128
"""Bytes: three rows of float32 of a hidden size of 32, and twelve."""


class FileCollectives(SymmetricCollectives):
    """Sums in stages that are files, through gloo."""

    def in_stage(self, buffer: Buffer, shape: torch.Size) -> Tensor:
        part = buffer.own[: shape.numel()].view(shape)
        total = self.base.all_reduce(part.clone())
        return part.copy_(total) if part.nbytes > self.crossovers.one_shot else total


def main() -> None:
    """Be a rank."""
    rank, size, folder, model = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    quicken()
    group = join_group(rank, size, f"file://{folder}/meeting", torch.device("cpu"))
    numbers, alive = itertools.count(), []

    def allocate(count: int, dtype: torch.dtype, device: torch.device, fill: float = 0.0) -> Buffer:
        number = next(numbers)
        paths = [folder / f"{number}-{other}" for other in range(size)]
        paths[rank].write_bytes(torch.full((count,), fill, dtype=dtype).numpy().tobytes())
        group.least(0)
        mapped = [torch.from_file(str(path), shared=True, size=count, dtype=dtype) for path in paths]
        alive.append(mapped)
        return Buffer(mapped[rank], torch.tensor([t.data_ptr() for t in mapped], dtype=torch.int64))

    def equip(config: Config, group: TPGroup, spec: ModelSpec, ops: Operations, dtype: torch.dtype) -> Equipment:
        shard = vocab_shard(spec.vocab_size, rank, size)
        stages = Stages(TWO_SHOT, dtype, torch.device("cpu"))
        collectives = FileCollectives(group.collectives, stages, Crossovers(ONE_SHOT, TWO_SHOT))
        fusion = fused.make_fusion(group, collectives, spec.hidden_size, shard)
        try_norm(group.collectives, fusion.norm, ops, spec.hidden_size, (1, 3, 4, 9))
        plain = parallel_operations(ops, TPGroup(rank, size, collectives, group.control), shard)
        operations = fused.staged_operations(ops, plain, shard, collectives, fusion)
        return overlap(config, Equipment(TPGroup(rank, size, collectives, group.control), operations, "files"), ops)

    with (
        mock.patch.object(symmetric, "allocate", allocate),
        mock.patch.object(fused, "allocate", allocate),
        mock.patch.object(sharded_sampling, "COPIERS", 1),  # the interpreter takes its time for each program
        mock.patch("minisgl.core.executor.equip", equip),
        mock.patch("minisgl.core.executor.pack_weights"),
        mock.patch.object(fused, "one_shot_add_rms_norm", wraps=sums.one_shot_add_rms_norm) as one_shot,
        mock.patch.object(fused, "two_shot_add_rms_norm", wraps=sums.two_shot_add_rms_norm) as two_shot,
        mock.patch.object(ShardedSampling, "sample", autospec=True, side_effect=ShardedSampling.sample) as sample,
        mock.patch.object(OverlappedSums, "add", autospec=True, side_effect=OverlappedSums.add) as add,
    ):
        settings = config(max_prefill_length=200, all_reduce_overlap=4)
        executor = build_local_executor(settings, folder, SPECS[model], MAX_SEQ_LEN, group=group)
        answers = generate(executor, SPECS[model], settings, count=8)
    launches = [operation.call_count for operation in (one_shot, two_shot, sample, add)]
    print(json.dumps({"tokens": [answer.tokens for answer in answers], "launches": launches}))


if __name__ == "__main__":
    main()
