"""What GPUs read in each other's memory, the ranks all on one device: streams of a GPU, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.dtypes import SLOW_DTYPES
from minisgl.core.sampler import SamplingRows
from minisgl.core.sampler import sample as reference_sample
from minisgl.gpu.kernels import sharded_sampling
from minisgl.gpu.kernels.ranks import Ranks, flags_size
from minisgl.gpu.kernels.sharded_sampling import ShardedSampling, partial_words, split_for


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=tensors[0].device)


class Group:
    """The ranks of a group, and a way to launch a kernel on each as if it had a device of its own."""

    def __init__(self, world: int, device: torch.device, waits: bool) -> None:
        self.flags = [torch.zeros(flags_size(world), dtype=torch.int32, device=device) for _ in range(world)]
        shared = addresses(self.flags)
        self.ranks = [Ranks(rank, world, own, shared) for rank, own in enumerate(self.flags)]
        self.streams = [torch.cuda.Stream() for _ in range(world if waits else 0)]  # type: ignore[no-untyped-call]

    def run(self, launch: Callable[[Ranks], Any]) -> list[Any]:
        if not self.streams:
            found = []
            for ranks in self.ranks:  # nobody waits: every other rank is there already
                for flags in self.flags:
                    flags.fill_(2**30)
                found.append(launch(ranks))
            return found
        torch.cuda.synchronize()
        found = []
        for ranks, stream in zip(self.ranks, self.streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(launch(ranks))
        torch.cuda.synchronize()
        return found


def groups(world: int, device: torch.device) -> Iterator[Group]:
    """One whose ranks run one after the other; on a card, with every kernel loaded by then, one that runs at once."""
    yield Group(world, device, waits=False)
    if device.type == "cuda":
        yield Group(world, device, waits=True)


def parameters(rows: int, device: torch.device) -> SamplingRows:
    """Greedy, free, and every filter; one that keeps most, and one whose stop ids are masked."""

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat(rows)[:rows].to(device)

    return SamplingRows(
        temperature=column([0.0, 0.6, 1.0, 1.3, 0.8, 2.0, 1.0], torch.float32),
        top_p=column([1.0, 1.0, 0.9, 0.5, 1.0, 0.999, 1.0], torch.float32),
        min_p=column([0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0], torch.float32),
        top_k=column([0, 0, 0, 7, 0, 0, 300], torch.int32),
        seed=torch.arange(rows, device=device),
        min_len=column([0, 0, 0, 100, 0, 0, 0], torch.int32),
        stop_ids=torch.arange(rows * 2, dtype=torch.int32, device=device).view(rows, 2) * 5 % 64,
    )


@pytest.mark.parametrize("dtype", SLOW_DTYPES)
@pytest.mark.parametrize(("world", "vocab"), [(2, 200), (3, 64)])
def test_shards_choose_the_references_tokens_on_every_rank(
    world: int, vocab: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded_sampling, "COPIERS", 2 if device.type == "cpu" else sharded_sampling.COPIERS)
    torch.manual_seed(vocab)
    count, capacity, width = 7, 9, -(-vocab // (64 * world)) * 64
    logits = (torch.randn(count, vocab, device=device) * 2).to(dtype)
    table, slots = parameters(count, device), torch.arange(count, dtype=torch.int32, device=device).flip(0).contiguous()
    positions = 10 + slots
    shards = [torch.zeros(capacity, width, dtype=dtype, device=device) for _ in range(world)]
    for rank, shard in enumerate(shards):
        own = logits[:, rank * width : (rank + 1) * width]
        shard[:count, : own.shape[1]] = own
    expected = reference_sample(logits, table.select(slots.long()), positions)
    for group in groups(world, device):
        words = torch.full((partial_words(capacity, width),), float("-inf"), device=device).view(torch.int32)
        words[: capacity * (width // split_for(width))] = 0  # no winner yet: token 0, which nobody can choose
        partials = [words.clone() for _ in range(world)]
        sampling = [
            ShardedSampling(
                ranks=ranks, vocab=vocab, width=width, rows=capacity, own_logits=shards[ranks.rank],
                own_partials=partials[ranks.rank], logits=addresses(shards), partials=addresses(partials),
                gathered=torch.full((capacity, world * width), float("nan"), dtype=dtype, device=device),
            )
            for ranks in group.ranks
        ]  # fmt: skip
        for _ in range(2):  # one after the other, a rank finds all partials only the second time
            tokens = group.run(partial(sample_own, sampling, count, table, slots, positions))
        for found in tokens:
            assert torch.equal(found, expected)


def sample_own(
    sampling: list[ShardedSampling], count: int, table: SamplingRows, slots: Tensor, positions: Tensor, ranks: Ranks
) -> Tensor:
    return sampling[ranks.rank].sample(count, table, slots, positions)
