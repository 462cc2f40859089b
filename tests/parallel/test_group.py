"""Groups of real processes, through gloo: what they say, what they read, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.processes import alive, children, wait_until_gone
from helpers.tiny_models import ARCHITECTURES, save_model
from minisgl import LLM, SamplingParams
from minisgl.core.model_config import read_spec
from minisgl.core.weights import Checkpoint, load_weights, parameters
from minisgl.distributed import worker_pool as members
from minisgl.distributed.shard import cutter
from minisgl.errors import ConfigError, EngineDeadError

SETTINGS: dict[str, Any] = {
    "num_pages": 30,
    "page_size": 4,
    "max_running_requests": 8,
    "max_prefill_length": 24,
    "progress": False,
}


def workload(count: int = 50) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts, half with a common prefix, and greedy and seeded parameters with every filter."""
    rng = np.random.default_rng(1)
    shared = rng.integers(2, 400, 20).tolist()
    prompts = [(shared if i % 2 else []) + rng.integers(2, 400, rng.integers(1, 20)).tolist() for i in range(count)]
    params = [
        SamplingParams(
            temperature=(0.0, 0.8, 1.5)[i % 3],
            top_p=(1.0, 0.9, 0.5)[i % 4 % 3],
            top_k=(0, 0, 20, 3)[i % 7 % 4],
            min_p=(0.0, 0.05)[i % 5 == 4],
            seed=i,
            max_tokens=12 + i % 9,
            ignore_eos=i % 4 != 0,
        )
        for i in range(count)
    ]
    return prompts, params


def answers(folder: Path, tp: int, count: int | None = None) -> tuple[list[list[int]], int]:
    """The tokens of every prompt, or the first `count`, and how often a request was retracted."""
    torch.set_num_threads(1)
    prompts, params = workload()
    prompts, params = prompts[:count], params[:count]
    with LLM(str(folder), tp=tp, **SETTINGS) as llm:
        found = [completion.token_ids for completion in llm.generate(prompts, params, progress=False)]
        return found, llm.engine.stats().retracted


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_processes_say_what_one_says(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, name)
    before = children(os.getpid())
    alone, _ = answers(tmp_path, 1)
    together, retracted = answers(tmp_path, 2)
    assert together == alone
    assert retracted > 0
    assert children(os.getpid()) == before


def test_four_processes_say_what_one_says(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen2")
    assert answers(tmp_path, 4, count=10)[0] == answers(tmp_path, 1, count=10)[0]


def test_each_rank_reads_only_its_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(save_model(tmp_path, "qwen3-moe"))
    read: list[int] = []
    largest: list[int] = []
    original: Callable[[Checkpoint, str, Tensor, tuple[slice, ...]], None] = Checkpoint.read_into

    def counted(self: Checkpoint, name: str, destination: Tensor, take: tuple[slice, ...]) -> None:
        read[-1] += destination.numel()
        largest.append(destination.numel())
        original(self, name, destination, take)

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    for rank in range(2):
        read.append(0)
        load_weights(tmp_path, spec, torch.float32, torch.device("cpu"), cut=cutter(spec, rank, 2))
    whole = {p.field: int(np.prod(p.shape)) for p in parameters(spec)}
    twice = sum(int(np.prod(p.shape)) for p in parameters(spec) if p.field.endswith("norm") or p.field == "router")
    assert sum(read) == sum(int(np.prod(p.shape)) for p in parameters(spec)) + twice
    assert max(largest) <= -(-whole["embedding"] // 2) + 64 * spec.hidden_size


def test_what_cannot_be_cut_is_refused_by_name_and_number(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", num_attention_heads=6, num_key_value_heads=3)
    for tp, message in ((4, "6 query heads are not a multiple of 4"), (2, "3 KV heads are neither a multiple nor")):
        with pytest.raises(ConfigError, match=message):
            LLM(str(tmp_path), tp=tp, **SETTINGS)
    save_model(tmp_path, "qwen3-moe", moe_intermediate_size=41)
    with pytest.raises(ConfigError, match=r"--tp 2: Qwen3MoeForCausalLM .* experts' width of 41"):
        LLM(str(tmp_path), tp=2, **SETTINGS)
    assert not children(os.getpid())


def test_a_group_that_does_not_fit_says_so_and_leaves_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    with pytest.raises(ConfigError, match=r"--num-pages 100000000 needs .* of memory in all"):
        LLM(str(tmp_path), tp=2, num_pages=100_000_000, progress=False)
    # Less than there is in all, and more than is free: each rank finds out.
    monkeypatch.setattr("minisgl.gpu.memory.total_memory", lambda device: 2**60)
    with pytest.raises(ConfigError, match=r"--num-pages 100000000 needs .* were free"):
        LLM(str(tmp_path), tp=2, num_pages=100_000_000, progress=False)
    assert not children(os.getpid())


def test_a_rank_that_ends_at_its_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    monkeypatch.setattr(members, "RANK_COMMAND", ("/bin/sh", "-c", "exit 3"))
    with pytest.raises(EngineDeadError, match="rank 1 of 2 ended with 3"):
        LLM(str(tmp_path), tp=2, **SETTINGS)
    assert not children(os.getpid())


def test_a_rank_killed_while_it_computes_ends_the_generation(tmp_path: Path) -> None:
    save_model(tmp_path)
    with LLM(str(tmp_path), tp=2, num_pages=2000, progress=False) as llm:
        (rank,) = children(os.getpid())
        stream = llm.stream([2, 3], SamplingParams(max_tokens=20_000, ignore_eos=True))
        next(stream)
        threading.Timer(0.2, os.kill, (rank, signal.SIGKILL)).start()
        with pytest.raises(EngineDeadError, match="rank 1 of 2"):
            list(stream)
        with pytest.raises(EngineDeadError):
            llm.generate([2, 3], progress=False)
    assert not alive(rank)
    wait_until_gone([rank])


def test_a_group_can_follow_another(tmp_path: Path) -> None:
    save_model(tmp_path)
    with LLM(str(tmp_path), tp=2, **SETTINGS) as llm:
        first = llm.generate([2, 3], SamplingParams(temperature=0, max_tokens=4), progress=False)
        with pytest.raises(ConfigError, match="in use in this process already"):
            LLM(str(tmp_path), tp=2, **SETTINGS)
    with LLM(str(tmp_path), tp=2, **SETTINGS) as llm:
        assert llm.generate([2, 3], SamplingParams(temperature=0, max_tokens=4), progress=False) == first
    assert not children(os.getpid())


def test_ranks_that_are_left_alone_before_they_meet_go() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    started = []
    for rank in (1, 2):
        process = subprocess.Popen(members.RANK_COMMAND, stdin=subprocess.PIPE)
        line = members.RankStart(
            rank=rank, size=3, device="cpu", folder=str(folder), rendezvous=f"file://{folder}/meeting",
            plans=f"ipc://{folder}/plans-{rank}", word=f"ipc://{folder}/word",
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(line) + b"\n")
        process.stdin.close()
        started.append(process)
    try:
        assert [process.wait(60) for process in started] == [1, 1]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not folder.exists()
