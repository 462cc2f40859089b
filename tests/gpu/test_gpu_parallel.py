"""Groups of GPUs against one GPU, and what a killed rank leaves. A group starts once and answers all questions."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engine_program import Answers, EngineProgram
from helpers.gpu import need_gpus
from helpers.processes import children, wait_for, wait_until_gone

pytestmark = pytest.mark.gpu

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
LAYERS = 8
"""Of the large models: their GEMMs and all-reduces have the real widths, and groups start in seconds."""
LARGEST, MEAN = 0.3, 0.03
"""Bounds on the difference of a log-probability in bfloat16 between one GPU and several, which sum in another order."""
BEHIND = 0.3
"""By how much one GPU may prefer another token to the one that several sampled."""
GRAPHS = 32
"""Rows of the largest CUDA graph: the first steps of 48 rows run without."""
Params = list[dict[str, Any]]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    base = {"model": str(folder), "dummy_weight": True, "dtype": "bfloat16", "num_pages": 2048}
    return {**base, "max_running_requests": 64, "cuda_graph_max_bs": GRAPHS, "max_seq_len_override": 2048, **changes}


class SingleGpu:
    """Engines on one GPU, one for each model, started when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines: dict[Path, EngineProgram] = {}

    def model(self, name: str) -> Path:
        """The folder of a model, a large one with fewer layers."""
        if name == "Qwen3-0.6B":
            return MODELS / name
        config = json.loads((MODELS / name / "config.json").read_text())
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
        return folder

    def start(self, model: Path) -> EngineProgram:
        """The engine of a model, which need not be ready yet."""
        if model not in self.engines:
            self.engines[model] = EngineProgram(settings(model, cuda_graph_max_bs=0))
        return self.engines[model]

    def scores(self, model: Path, prompts: list[list[int]], found: Answers) -> Answers:
        """Log-probabilities of prompts with answers, and the highest ones."""
        sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, found["tokens"], strict=True)]
        params = [{"max_tokens": 1, "prompt_logprobs": 1, "temperature": 0.0}] * len(sequences)
        return self.start(model).ask(sequences, params)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SingleGpu]:
    engines = SingleGpu(tmp_path_factory.mktemp("models"))
    yield engines
    for engine in engines.engines.values():
        engine.close()


def questions() -> tuple[list[list[int]], Params]:
    """48 greedy prompts: enough rows for one shot and for two, and a long prompt. Half have shorter answers."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(8, 80, 47).tolist(), 1500]
    prompts = [rng.integers(0, 150_000, length).tolist() for length in lengths]
    return prompts, [
        {"temperature": 0.0, "max_tokens": 20 + 20 * (i % 2), "ignore_eos": True, "logprobs": 0} for i in range(48)
    ]


def differences(prompts: list[list[int]], found: Answers, one: Answers, count: int | None = None) -> Any:
    """Of the log-probabilities of each answer's first `count` tokens, or of all of them, between two engines."""
    pairs = zip(prompts, found["logprobs"], one["prompt_logprobs"], strict=True)
    parts = [np.abs(np.array(mine) - np.array(other[len(p) - 1 :]))[:count] for p, mine, other in pairs]
    return np.concatenate(parts)


def check_answers(single: SingleGpu, model: Path, prompts: list[list[int]], found: Answers) -> tuple[float, float]:
    """Hold every token and its log-probability to one GPU's; the largest and the mean difference."""
    one = single.scores(model, prompts, found)
    for prompt, best, own in zip(prompts, one["tops"], one["prompt_logprobs"], strict=True):
        assert float((np.array(best) - np.array(own))[len(prompt) - 1 :].max()) < BEHIND
    found_differences = differences(prompts, found, one)
    largest, mean = float(found_differences.max()), float(found_differences.mean())
    assert largest < LARGEST
    assert mean < MEAN
    return largest, mean


def check_sampling(single: SingleGpu, model: Path, engine: EngineProgram) -> None:
    """Seeds, filters and penalties choose on ranks what they choose on one GPU."""
    prompts = questions()[0][:32]
    kinds: Params = [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.5, "presence_penalty": 1.0, "logprobs": 3},
    ]
    params = [{"max_tokens": 4, "ignore_eos": True, "seed": i, **kinds[i % 4]} for i in range(len(prompts))]
    one, found = single.start(model).ask(prompts, params), engine.ask(prompts, params)
    first = [a[0] == b[0] for a, b in zip(one["tokens"], found["tokens"], strict=True)]
    assert sum(first) >= 28  # random weights make flat distributions: rounding may change a token


@pytest.mark.parametrize("all_reduce", ["nccl", "fused"])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_answer_as_one_gpu(
    tp: int, all_reduce: str, single: SingleGpu, record_property: Callable[[str, object], None]
) -> None:
    """With graphs and without; a `fused` start also compares its kernels with NCCL."""
    need_gpus(tp)
    model = single.model("Qwen3-0.6B")
    single.start(model)
    with EngineProgram(settings(model, tp=tp, all_reduce=all_reduce)) as engine:
        prompts, params = questions()
        found = engine.ask(prompts, params)
        record_property("largest, mean difference", check_answers(single, model, prompts, found))
        record_property("note", [note for note in found["notes"] if note.startswith("all_reduce")])
        check_sampling(single, model, engine)


@pytest.mark.parametrize("name", ["Qwen3-14B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("tp", [2, 4])
def test_large_models_answer_on_ranks_as_on_one_gpu(
    tp: int, name: str, single: SingleGpu, record_property: Callable[[str, object], None]
) -> None:
    need_gpus(tp)
    model = single.model(name)
    single.start(model)
    with EngineProgram(settings(model, tp=tp)) as engine:
        prompts, params = questions()
        found = engine.ask(prompts, params)
    if name == "Qwen3-14B":
        record_property("largest, mean difference", check_answers(single, model, prompts, found))
    else:  # rounding may change which experts are chosen, and then everything
        one = single.scores(model, prompts, found)
        median, most = np.quantile(differences(prompts, found, one, 4), [0.5, 0.9]).tolist()
        record_property("median, 9 in 10", (median, most))
        assert most < LARGEST


def test_a_killed_rank_ends_the_group_and_gives_its_memory_back(single: SingleGpu) -> None:
    need_gpus(2)
    model = single.model("Qwen3-0.6B")
    single.start(model).ask([[1, 2, 3]], [{"max_tokens": 1}])  # its memory is taken
    free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(2)]
    with EngineProgram(settings(model, tp=2, max_seq_len_override=30_000)) as engine:
        engine.begin([1, 2, 3], {"max_tokens": 25_000, "ignore_eos": True})
        ranks = children(engine.process.pid)
        assert torch.cuda.mem_get_info(1)[0] < free[1] - 2**30
        killed = time.monotonic()
        os.kill(ranks[0], signal.SIGKILL)
        errors = engine.errors()
        assert engine.process.returncode != 0
        assert "rank 1 of 2" in errors
        assert time.monotonic() - killed < 20
    wait_until_gone(ranks)
    wait_for(lambda: all(torch.cuda.mem_get_info(gpu)[0] > free[gpu] - 2**30 for gpu in range(2)))
