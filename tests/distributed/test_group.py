"""Groups of real processes, through gloo: what they generate, what they read, and how they end."""

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from torch import Tensor

from helpers.processes import children, wait_until_gone
from helpers.tiny_models import ARCHITECTURES, save_model
from helpers.tp_cases import requests
from minisgl import LLM, SamplingParams
from minisgl.config import Config
from minisgl.core.model_config import read_spec
from minisgl.core.weights import Checkpoint, load_weights, parameters
from minisgl.distributed import messages, worker_pool
from minisgl.distributed.messages import LoadModel
from minisgl.distributed.shard import sharder
from minisgl.errors import ConfigError, EngineDeadError

SETTINGS: dict[str, Any] = {
    "num_pages": 30, "page_size": 4, "max_running_requests": 8, "max_prefill_length": 24, "progress": False,
}  # fmt: skip
CASES = requests(400, 50, longer=8)


def answers(folder: Path, tp: int, count: int | None = None) -> tuple[list[list[int]], int]:
    """The tokens of every case, or the first `count`, and how often a request was retracted."""
    torch.set_num_threads(1)
    cases = CASES[:count]
    with LLM(str(folder), tp=tp, **SETTINGS) as llm:
        found = llm.generate([list(c.prompt) for c in cases], [c.params for c in cases], progress=False)
        return [completion.token_ids for completion in found], llm.engine.stats().retracted


def check_greedy(folder: Path, found: list[list[int]]) -> None:
    """Assert that each greedy token is the one that transformers' model finds most likely."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for case, tokens in zip(CASES, found, strict=True):
        if case.params.temperature == 0 and not case.params.min_tokens:
            with torch.inference_mode():
                logits = model(torch.tensor([[*case.prompt, *tokens]])).logits[0]
            assert logits[len(case.prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_processes_generate_what_one_does_and_the_reference(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, name)
    before = children(os.getpid())
    alone, _ = answers(tmp_path, 1)
    together, retracted = answers(tmp_path, 2)
    assert together == alone
    assert retracted > 0
    assert children(os.getpid()) == before
    check_greedy(tmp_path, together)


def test_a_group_on_one_host_has_no_socket_that_others_reach(tmp_path: Path) -> None:
    save_model(tmp_path)
    with LLM(str(tmp_path), tp=2, **SETTINGS):
        pids = [os.getpid(), *children(os.getpid())]
        found = [c.laddr.ip for pid in pids for c in psutil.Process(pid).net_connections("inet")]
        assert found, "gloo's"
        assert set(found) <= {"127.0.0.1", "::1"}


def test_four_processes_generate_what_one_does(tmp_path: Path) -> None:
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
        load_weights(tmp_path, spec, torch.float32, torch.device("cpu"), sharder=sharder(spec, rank, 2))
    whole = {p.field: int(np.prod(p.shape)) for p in parameters(spec)}
    twice = sum(int(np.prod(p.shape)) for p in parameters(spec) if p.field.endswith("norm") or p.field == "router")
    assert sum(read) == sum(int(np.prod(p.shape)) for p in parameters(spec)) + twice
    assert max(largest) <= -(-whole["embedding"] // 2) + 64 * spec.hidden_size


def test_what_cannot_be_split_is_refused_by_name_and_number(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", num_attention_heads=6, num_key_value_heads=3)
    possible = "--tp can be 1, 3, 6"
    for tp, message in ((4, "6 query heads are not a multiple of 4"), (2, "3 KV heads are neither a multiple nor .*")):
        with pytest.raises(ConfigError, match=f"{message}; {possible}"):
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
    monkeypatch.setattr(worker_pool, "WORKER_COMMAND", ("/bin/sh", "-c", "exit 3"))
    with pytest.raises(EngineDeadError, match="rank 1 of 2 ended with 3"):
        LLM(str(tmp_path), tp=2, **SETTINGS)
    assert not children(os.getpid())


def test_a_rank_killed_while_it_computes_ends_the_generation_and_the_other_ranks(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3", num_attention_heads=6, num_key_value_heads=3)
    with LLM(str(tmp_path), tp=3, num_pages=2000, progress=False) as llm:
        ranks = children(os.getpid())
        stream = llm.stream([2, 3], SamplingParams(max_tokens=20_000, ignore_eos=True))
        next(stream)
        os.kill(ranks[0], signal.SIGSTOP)  # it cannot notice by itself
        os.kill(ranks[1], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="rank 2 of 3"):
            list(stream)
        with pytest.raises(EngineDeadError):
            llm.generate([2, 3], progress=False)
        try:
            wait_until_gone(ranks)
        finally:
            with suppress(ProcessLookupError):
                os.kill(ranks[0], signal.SIGKILL)  # or the engine's end would wait for it


def test_a_group_can_follow_another(tmp_path: Path) -> None:
    save_model(tmp_path)
    with LLM(str(tmp_path), tp=2, **SETTINGS) as llm:
        first = llm.generate([2, 3], SamplingParams(temperature=0, max_tokens=4), progress=False)
        with pytest.raises(ConfigError, match="in use in this process already"):
            LLM(str(tmp_path), tp=2, **SETTINGS)
    with LLM(str(tmp_path), tp=2, **SETTINGS) as llm:
        assert llm.generate([2, 3], SamplingParams(temperature=0, max_tokens=4), progress=False) == first
    assert not children(os.getpid())


def test_workers_end_that_are_left_alone_before_they_have_joined(tmp_path: Path) -> None:
    started = []
    for rank in (1, 2):
        link, theirs = socket.socketpair()
        if rank == 2:  # it joins, and waits for rank 0
            link.sendall(messages.frame(LoadModel(Config(), str(tmp_path), 100)))
        with link, theirs:
            rendezvous, own = f"file://{tmp_path}/rendezvous", str(theirs.fileno())
            command = [*worker_pool.WORKER_COMMAND, str(rank), "3", "cpu", rendezvous, own]
            started.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
    try:
        assert [process.wait(60) for process in started] == [1, 1]
    finally:
        for process in started:
            process.kill()
            process.wait()
