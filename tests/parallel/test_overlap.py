"""Sums over ranks that are hidden behind products: which steps are cut, and what ranks then say."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from helpers.ranked import MAX_SEQ_LEN, NOWHERE, SPECS, config, generate
from helpers.ranks import ThreadGroup, on_all
from minisgl.core.executor import build_local_executor
from minisgl.core.ops import PLAIN
from minisgl.distributed.collectives import TPGroup
from minisgl.distributed.overlap import OverlappedSums

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["llama-biased", "qwen2", "qwen3", "qwen3-moe"])
def test_ranks_that_hide_sums_say_what_one_device_says(model: str) -> None:
    torch.set_num_threads(1)
    spec, settings = SPECS[model], config(all_reduce_overlap=4)
    alone = build_local_executor(config(), NOWHERE, spec, MAX_SEQ_LEN)
    expected = generate(alone, spec, config(), count=20)
    with mock.patch.object(OverlappedSums, "add", autospec=True, side_effect=OverlappedSums.add) as add:
        together = ThreadGroup(settings, NOWHERE, spec, MAX_SEQ_LEN, 2)
        assert generate(together, spec, settings, retractions=8, count=20) == expected
    assert add.call_count > 100
    assert {len(call.args[1]) >= 4 for call in add.call_args_list} == {True}


@pytest.mark.parametrize(
    ("rows", "least", "beyond", "parts"),
    [
        (16384, 1024, 0, [8192, 8192]),
        (8200, 1024, 0, [4096, 4104]),
        (2048, 1024, 0, [1024, 1024]),
        (2047, 1024, 0, None),
        (2500, 1024, 0, [1152, 1348]),
        (8200, 1024, 4096 * 64, None),
        (8200, 1024, 4096 * 64 - 1, [4096, 4104]),
        (11, 4, 0, [4, 7]),
        (7, 4, 0, None),
    ],
)
def test_steps_are_cut_whose_halves_are_large(rows: int, least: int, beyond: int, parts: list[int] | None) -> None:
    residual = torch.zeros(rows, 32, dtype=torch.bfloat16)  # 64 bytes a row

    def cut(group: TPGroup) -> list[int] | None:
        turns = OverlappedSums(group.collectives, PLAIN, least, beyond, CPU).cut(residual)
        return None if turns is None else [len(part) for part in turns.split(residual)]

    assert on_all(2, cut) == [parts, parts]


def test_a_sum_begins_at_once_and_ends_with_its_norm() -> None:
    torch.manual_seed(0)
    parts, residual, weight = torch.randn(2, 6, 8), torch.randn(6, 8), torch.randn(8)
    stream = residual.clone()
    expected = PLAIN.add_rms_norm(parts.sum(0), stream, weight, 1e-6)

    def add(group: TPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        own = residual.clone()
        sums = OverlappedSums(group.collectives, PLAIN, 1, 0, CPU)
        norms = [sums.add(part) for part in torch.split(parts[group.rank], [2, 4])]
        normed = [norm(rows, weight, 1e-6) for norm, rows in zip(norms, torch.split(own, [2, 4]), strict=True)]
        return torch.cat(normed), own

    for normed, own in on_all(2, add):
        torch.testing.assert_close(normed, expected)
        torch.testing.assert_close(own, stream)
