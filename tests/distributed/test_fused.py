"""The kernels that write to other ranks' memory, in processes that share files, through a whole engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.processes import environment
from helpers.tp_cases import MAX_SEQ_LEN, NOWHERE, SPECS, config, generate
from minisgl.gpu.executor import build_local_executor

SECONDS = 240


@pytest.mark.parametrize("model", ["qwen3-moe", "llama-biased"])
def test_fused_ranks_generate_what_one_device_does(tmp_path: Path, model: str) -> None:
    torch.set_num_threads(1)
    alone = build_local_executor(config(), NOWHERE, SPECS[model], MAX_SEQ_LEN)
    expected = [answer.tokens for answer in generate(alone, SPECS[model], config(), count=8)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.fused_rank", str(rank), "2", str(tmp_path), model],
            stdout=subprocess.PIPE, text=True, env=environment(TRITON_INTERPRET="1"),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    for text in printed:
        found = json.loads(text.splitlines()[-1])
        assert found["tokens"] == expected
        assert min(found["launches"]) > 5, "one shot, two shots, sampling"
