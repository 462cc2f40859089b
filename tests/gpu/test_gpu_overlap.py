"""Sums hidden behind products on cards: nothing is read before it is summed, and answers are those of unhidden sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.gpu import need_cards
from helpers.group_answers import ask
from minisgl.core.ops import PLAIN, Turns
from minisgl.distributed.overlap import OverlappedSums
from minisgl.gpu.operations import fused_operations

pytestmark = pytest.mark.gpu

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
LARGEST, MEAN = 0.3, 0.03
"""Bounds on the difference of a log-probability in bfloat16 between products of all rows and of half of them."""
LONG = [6000, 5000, 3000, 40]
WAYS: dict[str, dict[str, Any]] = {
    "nccl": {"all_reduce": "nccl"},
    "torch.distributed": {"all_reduce": "nccl", "disable_pynccl": True},
    "beside symmetric memory": {"all_reduce_crossovers": "64,1024"},
}


class SlowSums:
    """What stands for three equal ranks: a sum that takes milliseconds."""

    def all_reduce(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(5_000_000)  # type: ignore[no-untyped-call]
        return x.mul_(3)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.expand(3, *x.shape)

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_norm_waits_for_its_sum_and_memory_for_both() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ops = fused_operations(device)
    sums = OverlappedSums(SlowSums(), ops, 256, 0, device)
    x = torch.randn(1000, 512, dtype=torch.bfloat16, device=device)
    weight, matrix = torch.ones_like(x[0]), torch.randn(512, 512, dtype=x.dtype, device=device) / 16
    found, expected = torch.zeros_like(x), torch.zeros_like(x)
    turns = sums.cut(x)
    assert turns is not None
    assert turns.rows == (384, 616)
    rows = turns.split(x)
    for _ in range(8):
        norms = [turns.add(part @ matrix) for part in rows]
        for _ in range(4):  # takes what the allocator believes free
            torch.full((616, 512), torch.nan, dtype=x.dtype, device=device)
        rows = [norms.pop(0)(stream, weight, 1e-6) for stream in turns.split(found)]
    whole = x
    for _ in range(8):
        pieces = [part @ matrix * 3 for part in turns.split(whole)]
        streams = turns.split(expected)
        whole = torch.cat([ops.add_rms_norm(p, s, weight, 1e-6) for p, s in zip(pieces, streams, strict=True)])
    torch.testing.assert_close(torch.cat(list(rows)), whole, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nothing_takes_turns_in_a_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    sums = OverlappedSums(SlowSums(), PLAIN, 256, 0, device)
    x = torch.zeros(1024, 64, device=device)
    seen: list[Turns | None] = []
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        seen.append(sums.cut(x.add_(1)))
    assert seen == [None]
    assert sums.cut(x) is not None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Qwen3-30B-A3B"])
def test_hidden_sums_say_what_others_say(model: str, way: str, record_property: Callable[[str, object], None]) -> None:
    need_cards(2)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 150_000, length).tolist() for length in LONG]
    params = [{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "prompt_logprobs": 0}] * len(LONG)
    settings = {
        "model": str(MODELS / model), "dummy_weight": True, "dtype": "bfloat16", "num_pages": 2048, "tp": 2,
        "max_running_requests": 8, "cuda_graph_max_bs": 8, "max_seq_len_override": 8192, "max_prefill_length": 16384,
        **WAYS[way],
    }  # fmt: skip
    hidden = ask({**settings, "all_reduce_overlap": 1024}, prompts, params)
    others = ask({**settings, "all_reduce_overlap": 0}, prompts, params)
    assert "all_reduce_overlap = 1024" in hidden["notes"]
    pairs = zip(hidden["prompt_logprobs"], others["prompt_logprobs"], strict=True)
    differences = np.concatenate([np.abs(np.array(mine) - np.array(theirs)) for mine, theirs in pairs])
    record_property(f"{model}, {way}: largest, mean", (float(differences.max()), float(differences.mean())))
    if model == "Qwen3-0.6B":
        assert float(differences.max()) < LARGEST
        assert float(differences.mean()) < MEAN
    else:  # rounding may change which experts are chosen
        assert float(np.quantile(differences, 0.9)) < LARGEST
