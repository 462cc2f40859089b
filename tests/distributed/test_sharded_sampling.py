"""Sampling from sharded logits, the ranks all on one device: streams of a GPU, or one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.interpreter import quicken
from helpers.sampling_rows import SLOW_DTYPES, sampling_rows
from minisgl.core.sampler import sample as reference_sample
from minisgl.gpu.kernels import sharded_sampling
from minisgl.gpu.kernels.sharded_sampling import Barrier, ShardedSampling, flags_size, partial_words, split_for

if not torch.cuda.is_available():
    quicken()


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=tensors[0].device)


class Group:
    """The ranks of a group, and a way to launch a kernel on each as if it had a device of its own.

    `at_once`: on streams of a GPU, with every kernel loaded. Else one rank after the other, and none waits.
    """

    def __init__(self, world: int, device: torch.device, at_once: bool) -> None:
        self.at_once = at_once
        self.flags = [torch.zeros(flags_size(world), dtype=torch.int32, device=device) for _ in range(world)]
        shared = addresses(self.flags)
        self.barriers = [Barrier(rank, world, own, shared) for rank, own in enumerate(self.flags)]

    def run(self, launch: Callable[[Barrier], Tensor]) -> list[Tensor]:
        found = []
        for barrier in self.barriers:
            if self.at_once:
                with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                    found.append(launch(barrier))
                continue
            for flags in self.flags:
                flags.fill_(2**30)  # as if every other rank were there already
            found.append(launch(barrier))
        if self.at_once:
            torch.cuda.synchronize()
        return found


@pytest.mark.parametrize("dtype", SLOW_DTYPES)
@pytest.mark.parametrize(("world", "vocab"), [(2, 200), (3, 64)])
def test_every_rank_samples_the_references_tokens(
    world: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(sharded_sampling, "COPIERS", 2 if device.type == "cpu" else sharded_sampling.COPIERS)
    torch.manual_seed(vocab)
    count, capacity, width = 7, 9, -(-vocab // (64 * world)) * 64
    logits = (torch.randn(count, vocab, device=device) * 2).to(dtype)
    # Greedy, free, and every filter; one that keeps most, and one whose stop ids are masked.
    table = sampling_rows(
        count, device, temperature=[0.0, 0.6, 1.0, 1.3, 0.8, 2.0, 1.0], top_p=[1.0, 1.0, 0.9, 0.5, 1.0, 0.999, 1.0],
        min_p=[0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0], top_k=[0, 0, 0, 7, 0, 0, 300], min_len=[0, 0, 0, 100, 0, 0, 0],
        stop_ids=torch.arange(count * 2).view(count, 2) * 5 % 64,
    )  # fmt: skip
    slots = torch.arange(count, dtype=torch.int32, device=device).flip(0).contiguous()
    positions = 10 + slots
    shards = [torch.zeros(capacity, width, dtype=dtype, device=device) for _ in range(world)]
    for rank, shard in enumerate(shards):
        own = logits[:, rank * width : (rank + 1) * width]
        shard[:count, : own.shape[1]] = own
    expected = reference_sample(logits, table.select(slots.long()), positions)
    for at_once in (False, True)[: 1 if device.type == "cpu" else 2]:
        group = Group(world, device, at_once)
        words = torch.full((partial_words(capacity, width),), float("-inf"), device=device).view(torch.int32)
        words[: capacity * (width // split_for(width))] = 0  # no winner yet: token 0, which cannot be sampled
        partials = [words.clone() for _ in range(world)]
        sampling = [
            ShardedSampling(
                barrier=barrier, vocab=vocab, width=width, rows=capacity, own_logits=shards[barrier.rank],
                own_partials=partials[barrier.rank], logits=addresses(shards), partials=addresses(partials),
                gathered=torch.full((capacity, world * width), float("nan"), dtype=dtype, device=device),
            )
            for barrier in group.barriers
        ]  # fmt: skip
        if at_once:
            torch.cuda.synchronize()
        for _ in range(2):  # one after the other, a rank finds all partials the second time only
            tokens = group.run(lambda barrier: sampling[barrier.rank].sample(count, table, slots, positions))  # noqa: B023
        for found in tokens:
            assert torch.equal(found, expected)
