"""`python -m helpers.fused_rank RANK SIZE FOLDER MODEL`: a rank whose fused kernels run in triton's interpreter.

Files that all ranks map stand in for symmetric memory. Every rank runs an engine of its own over the same requests, and
prints their tokens and how often it launched each kernel as a line of JSON.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from helpers.interpreter import quicken
from helpers.tp_cases import MAX_SEQ_LEN, SPECS, config, generate
from minisgl.config import Config
from minisgl.core.model_config import ModelSpec
from minisgl.core.ops import Operations
from minisgl.distributed import fused
from minisgl.distributed.collectives import TPGroup, join_group
from minisgl.distributed.executor import build_rank_executor, parallel_operations
from minisgl.distributed.shard import vocab_shard
from minisgl.gpu.kernels import all_reduce, sharded_sampling
from minisgl.gpu.kernels.sharded_sampling import ShardedSampling

CPU = torch.device("cpu")
ONE_SHOT_BYTES, MAX_ROWS = 3 * 128, 12  # one shot up to three rows of 32 float32, two up to twelve rows


def main() -> None:
    rank, size, folder, model = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    quicken()
    group = join_group(rank, size, f"file://{folder}/rendezvous", CPU)
    numbers, mappings = itertools.count(), []

    def allocate(count: int, dtype: torch.dtype, device: torch.device, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        number = next(numbers)
        paths = [folder / f"{number}-{other}" for other in range(size)]
        paths[rank].write_bytes(torch.full((count,), fill, dtype=dtype).numpy().tobytes())
        group.barrier()
        mapped = [torch.from_file(str(path), shared=True, size=count, dtype=dtype) for path in paths]
        mappings.append(mapped)  # they must live as long as any rank
        return mapped[rank], torch.tensor([t.data_ptr() for t in mapped], dtype=torch.int64)

    def select(_: Config, group: TPGroup, spec: ModelSpec, ops: Operations) -> Any:
        shard, hidden = vocab_shard(spec.vocab_size, rank, size), spec.hidden_size
        plain = parallel_operations(ops, group, shard)
        fast = fused.fused_parallel_operations(plain, ops, group, hidden, shard, torch.float32, CPU, ONE_SHOT_BYTES)
        return fast, "files"

    with (
        mock.patch.object(fused, "allocate", allocate),
        mock.patch.object(fused, "MAX_ROWS", MAX_ROWS),
        mock.patch.object(fused, "CHECKED_ROWS", (1, 3, 4, 9)),
        mock.patch.object(sharded_sampling, "COPIERS", 1),  # the interpreter takes its time for each program
        mock.patch("minisgl.distributed.executor.select_collectives", select),
        mock.patch("minisgl.gpu.executor.pack_weights"),
        mock.patch.object(all_reduce, "one_shot_add_rms_norm", wraps=all_reduce.one_shot_add_rms_norm) as one_shot,
        mock.patch.object(all_reduce, "two_shot_add_rms_norm", wraps=all_reduce.two_shot_add_rms_norm) as two_shot,
        mock.patch.object(ShardedSampling, "sample", autospec=True, side_effect=ShardedSampling.sample) as sample,
    ):
        settings = config(max_prefill_length=200)
        executor, *_ = build_rank_executor(settings, folder, SPECS[model], MAX_SEQ_LEN, group)
        for launches in (one_shot, two_shot):
            launches.reset_mock()  # those of the check
        answers = generate(executor, SPECS[model], settings, count=8)
    counts = [launches.call_count for launches in (one_shot, two_shot, sample)]
    print(json.dumps({"tokens": [answer.tokens for answer in answers], "launches": counts}))


if __name__ == "__main__":
    main()
