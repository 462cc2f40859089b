"""Tensor parallelism on GPUs: what groups generate against one GPU, with all collectives, and how they end.

A group starts once for each configuration, together with the others, and all checks of it are questions to that group.
What `fused` computes is compared with NCCL at its start.
"""

import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engine_program import Answers, EngineProgram, ask
from helpers.gpu import need_gpus
from helpers.processes import children, wait_for, wait_until_gone

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
SMALL = "Qwen3-0.6B"
LAYERS = 8  # of the large models: their GEMMs and all-reduces keep the real widths, and groups start in seconds
LARGEST, MEAN = 0.3, 0.03  # differences of a log-probability in bfloat16 between one GPU and several
BEHIND = 0.3  # by how much one GPU may prefer another token to the one that several chose
COLLECTIVES: dict[str, dict[str, Any]] = {
    "auto": {"all_reduce": "auto", "cuda_graph_max_bs": 64},
    "fused, no graphs": {"all_reduce": "fused", "cuda_graph_max_bs": 0},
    "nccl": {"all_reduce": "nccl", "cuda_graph_max_bs": 64},
    "torch.distributed, no graphs": {"all_reduce": "nccl", "disable_pynccl": True, "cuda_graph_max_bs": 0},
}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.5, "presence_penalty": 1.0, "logprobs": 3},
]
SAMPLED = [{"max_tokens": 4, "ignore_eos": True, "seed": i, **KINDS[i % 4]} for i in range(32)]


def shortened(model: str, folder: Path) -> Path:
    config = json.loads((MODELS / model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    return folder


def settings(model: str | Path, **changes: Any) -> dict[str, Any]:
    base = {"model": str(MODELS / model), "dummy_weight": True, "dtype": "bfloat16", "num_pages": 2048}
    return {**base, "max_running_requests": 64, "cuda_graph_max_bs": 64, "max_seq_len_override": 2048, **changes}


def questions() -> tuple[list[list[int]], list[dict[str, Any]]]:
    """48 prompts, greedy; enough rows for one shot and for two, and a long one among the prompts."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(8, 80, 47).tolist(), 1500]
    prompts = [rng.integers(0, 150_000, length).tolist() for length in lengths]
    return prompts, [{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 0}] * len(prompts)


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[EngineProgram]:
    with EngineProgram(settings(SMALL)) as engine:
        yield engine


@pytest.fixture(scope="module", params=[2, 4])
def tp(request: pytest.FixtureRequest) -> int:
    need_gpus(request.param)
    return int(request.param)


@pytest.fixture(scope="module")
def groups(tp: int) -> Iterator[dict[str, EngineProgram]]:
    """The small model on groups of `tp` GPUs, one for each of COLLECTIVES, started side by side."""
    with contextlib.ExitStack() as stack:
        groups = {
            name: stack.enter_context(EngineProgram(settings(SMALL, tp=tp, **changes)))
            for name, changes in COLLECTIVES.items()
        }
        for group in groups.values():  # all are ready then, and their memory is taken
            group.ask([[1, 2, 3]], [{"max_tokens": 1}])
        yield groups


@functools.cache
def sampled_on_one(engine: EngineProgram) -> Answers:
    return engine.ask(questions()[0][: len(SAMPLED)], SAMPLED)


def scored(engine: EngineProgram, sequences: list[list[int]]) -> Answers:
    """One GPU's log-probabilities of whole sequences, and the highest ones."""
    return engine.ask(sequences, [{"max_tokens": 1, "prompt_logprobs": 1, "temperature": 0.0}] * len(sequences))


def check_greedy(one_gpu: EngineProgram, found: Answers, prompts: list[list[int]]) -> tuple[float, float]:
    """Hold every token and its log-probability to one GPU's; the largest and the mean difference."""
    one = scored(one_gpu, [[*prompt, *answer] for prompt, answer in zip(prompts, found["tokens"], strict=True)])
    differences, theirs = [], zip(one["prompt_logprobs"], one["tops"], strict=True)
    for prompt, logprobs, (scores, tops) in zip(prompts, found["logprobs"], theirs, strict=True):
        begin = len(prompt) - 1
        mine, own, best = np.array(logprobs), np.array(scores[begin:]), np.array(tops[begin:])
        assert mine.shape == own.shape
        differences.append(np.abs(mine - own))
        assert float((best - own).max()) < BEHIND
    every = np.concatenate(differences)
    assert float(every.max()) < LARGEST
    assert float(every.mean()) < MEAN
    return float(every.max()), float(every.mean())


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_group_generates_what_one_gpu_does_and_ends_with_a_rank(
    tp: int, name: str, groups: dict[str, EngineProgram], one_gpu: EngineProgram,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    prompts, params = questions()
    with groups[name] as group:
        found = group.ask(prompts, params)
        (note,) = (note for note in found["notes"] if note.startswith("all_reduce"))
        record_property(f"tp {tp}, {name}: {note}: largest, mean difference", check_greedy(one_gpu, found, prompts))
        assert ("fused with the norm" in note) == (COLLECTIVES[name]["all_reduce"] != "nccl")
        sampled = group.ask(prompts[: len(SAMPLED)], SAMPLED)
        on_one = sampled_on_one(one_gpu)
        first = [a[0] == b[0] for a, b in zip(on_one["tokens"], sampled["tokens"], strict=True)]
        assert sum(first) >= 28  # random weights make flat distributions: rounding may change a token

        group.begin([1, 2, 3], {"max_tokens": 2000, "ignore_eos": True})
        ranks = children(group.process.pid)
        free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(tp)]
        os.kill(ranks[0], signal.SIGKILL)
        assert f"rank 1 of {tp}" in group.errors(timeout=20)
        assert group.process.returncode != 0
    wait_until_gone(ranks)
    wait_for(lambda: all(torch.cuda.mem_get_info(gpu)[0] > free[gpu] + 2**30 for gpu in range(tp)))


@pytest.mark.parametrize("model", ["Qwen3-14B", "Qwen3-30B-A3B"])
def test_large_models_generate_on_several_gpus_what_they_do_on_one(
    model: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    need_gpus(2)
    folder = shortened(model, tmp_path)
    prompts, params = questions()
    sizes = [size for size in (2, 4) if size <= torch.cuda.device_count()]
    with EngineProgram(settings(folder, cuda_graph_max_bs=0)) as one_gpu:
        for tp in sizes:
            found = ask(settings(folder, tp=tp), prompts, params)
            if model == "Qwen3-14B":
                record_property(f"tp {tp}: largest, mean difference", check_greedy(one_gpu, found, prompts))
                continue
            # Rounding may change which experts are chosen, and then everything.
            sequences = [[*prompt, *answer[:4]] for prompt, answer in zip(prompts, found["tokens"], strict=True)]
            one = scored(one_gpu, sequences)
            pairs = zip(prompts, found["logprobs"], one["prompt_logprobs"], strict=True)
            differences = np.concatenate([np.abs(np.array(m[:4]) - np.array(o[len(p) - 1 :])) for p, m, o in pairs])
            record_property(f"tp {tp}: median, 9 in 10", np.quantile(differences, [0.5, 0.9]).tolist())
            assert float(np.quantile(differences, 0.9)) < LARGEST
