"""The kernels that reach other ranks' memory, in processes that share files, through a whole engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.ranked import MAX_SEQ_LEN, NOWHERE, SPECS, config, generate
from minisgl.core.executor import build_local_executor

SECONDS = 240


@pytest.mark.parametrize(("model", "size"), [("qwen3-moe", 2), ("llama-biased", 2)])
def test_fused_ranks_say_what_one_device_says(tmp_path: Path, model: str, size: int) -> None:
    torch.set_num_threads(1)
    alone = build_local_executor(config(), NOWHERE, SPECS[model], MAX_SEQ_LEN)
    expected = [answer.tokens for answer in generate(alone, SPECS[model], config(), count=8)]
    command = [sys.executable, "-m", "helpers.shared_ranks"]
    here = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(tmp_path), model],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": here},
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size
    for text in said:
        answer = json.loads(text.splitlines()[-1])
        assert answer["tokens"] == expected
        *three, halves = answer["launches"]
        assert min(three) > 5, "one shot, two shots, sampling"
        assert halves > 3, "sums of halves"
