"""Ranks of a group say what one device says, whatever the architecture and the settings. Here the ranks are threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.ranked import MAX_SEQ_LEN, NOWHERE, SPECS, config, generate
from helpers.ranks import ThreadGroup, on_all
from helpers.special import slow_answer, special_requests
from minisgl.core.executor import build_local_executor
from minisgl.core.weights import dummy_weights
from minisgl.distributed.collectives import TPGroup


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) for name in SPECS]
    + [("qwen3", 4), ("qwen3-one-kv-head", 4), ("qwen3-moe", 4), ("tiny-vocabulary", 4), ("llama-biased", 4)],
)
def test_ranks_say_what_one_device_says(name: str, size: int) -> None:
    torch.set_num_threads(1)
    spec = SPECS[name]
    alone = build_local_executor(config(overlap=False, cache="naive"), NOWHERE, spec, MAX_SEQ_LEN)
    expected = generate(alone, spec, config(overlap=False, cache="naive"))
    together = ThreadGroup(config(), NOWHERE, spec, MAX_SEQ_LEN, size)
    assert generate(together, spec, config(), retractions=8) == expected


@pytest.mark.parametrize("size", [2, 4])
def test_special_requests_get_from_ranks_what_a_slow_computation_says(size: int) -> None:
    torch.set_num_threads(1)
    spec, asked = SPECS["qwen3"], special_requests(SPECS["qwen3"].vocab_size, 22)
    settings = config(num_pages=160)
    ranks = ThreadGroup(settings, NOWHERE, spec, MAX_SEQ_LEN, size)
    answers = generate(ranks, spec, settings, retractions=8, asked=asked)
    weights = dummy_weights(spec, torch.float32, torch.device("cpu"))
    for request, answer in zip(asked, answers, strict=True):
        slow_answer(spec, weights, request, MAX_SEQ_LEN).check(answer, request.params)


def test_shards_hold_the_weights_once_but_for_what_is_whole(tmp_path: Path) -> None:
    spec = SPECS["qwen3-moe"]

    def numel(group: TPGroup) -> int:
        decoder = build_local_executor(config(), tmp_path, spec, MAX_SEQ_LEN, group=group).runner.decoder
        layers = [t for layer in decoder.weights.layers for t in vars(layer).values() if t is not None]
        return sum(t.numel() for t in (decoder.weights.embedding, decoder.weights.head, *layers))

    whole = build_local_executor(config(), tmp_path, spec, MAX_SEQ_LEN).runner.decoder
    layers = [t for layer in whole.weights.layers for t in vars(layer).values() if t is not None]
    total = sum(t.numel() for t in (whole.weights.embedding, whole.weights.head, *layers))
    repeated = sum(t.numel() for t in layers if t.dim() == 1) + 6 * 32  # norms and the router
    padding = 2 * (256 - 211) * 32
    assert sum(on_all(2, numel)) == total + repeated + padding


def test_gathered_logits_are_one_devices() -> None:
    spec = SPECS["qwen3"]
    hidden = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(0))

    def logits(group: TPGroup | None) -> torch.Tensor:
        decoder = build_local_executor(config(), NOWHERE, spec, MAX_SEQ_LEN, group=group).runner.decoder
        return decoder.ops.whole_logits(decoder.logits(hidden))

    for found in on_all(4, logits):
        torch.testing.assert_close(found, logits(None))
