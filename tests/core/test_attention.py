from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minisgl.core import attention as torch_backend
from minisgl.core.attention import Attention, AttentionMetadata, SequenceBatch, TorchAttention, split_by_length
from minisgl.core.kv_cache import allocate_kv
from minisgl.core.ops import store_kv

HEADS, KV_HEADS, HEAD_DIM, MAX_TOKENS = 6, 2, 8, 1300
LAYER = 1


class Sequences:
    """Random cached sequences on scattered pages; pages past a sequence's end hold large numbers."""

    def __init__(self, kv_lens: list[int], page_size: int) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        max_pages = -(-MAX_TOKENS // page_size)
        need = [-(-length // page_size) for length in kv_lens]
        self.kv = allocate_kv(2, sum(need), page_size, KV_HEADS, HEAD_DIM, torch.float32, torch.device("cpu"))
        self.kv.k.fill_(50.0)
        self.kv.v.fill_(1e4)
        self.table = torch.full((len(kv_lens), max_pages), sum(need), dtype=torch.int32)
        self.k = [torch.randn(length, KV_HEADS, HEAD_DIM) for length in kv_lens]
        self.v = [torch.randn(length, KV_HEADS, HEAD_DIM) for length in kv_lens]
        for row, pages in enumerate(torch.split(torch.randperm(sum(need), dtype=torch.int32), need)):
            self.table[row, : need[row]] = pages
            token = torch.arange(kv_lens[row])
            slots = pages[token // page_size].long() * page_size + token % page_size
            store_kv(self.k[row], self.v[row], self.kv.k[LAYER], self.kv.v[LAYER], slots)

    def rows(self, slots: list[int], query_lens: list[int]) -> SequenceBatch:
        queries, kv = np.array(query_lens, np.int32), np.array([len(self.k[slot]) for slot in slots], np.int32)
        return SequenceBatch(page_table=self.table, slots=np.array(slots, np.int32), query_lens=queries, kv_lens=kv)

    def exact(self, q: Tensor, slot: int, window: int) -> Tensor:
        """Attention of the last len(q) tokens of a sequence, token by token in float64."""
        k, v = (t[slot].double().repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (self.k, self.v))
        out = []
        for i, query in enumerate(q.double()):
            last = len(k) - len(q) + i
            first = max(0, last - window + 1) if window else 0
            scores = torch.einsum("hd,thd->ht", query, k[first : last + 1]) / HEAD_DIM**0.5
            out.append(torch.einsum("ht,thd->hd", scores.softmax(dim=-1), v[first : last + 1]))
        return torch.stack(out)


def check(sequences: Sequences, decode: list[int], chunks: dict[int, int], window: int) -> None:
    """A step over these rows agrees with the exact attention of each."""
    query_lens = [1] * len(decode) + list(chunks.values())
    q = torch.randn(sum(query_lens), HEADS, HEAD_DIM)
    metadata = AttentionMetadata(
        decode=sequences.rows(decode, [1] * len(decode)) if decode else None,
        prefill=sequences.rows(list(chunks), list(chunks.values())) if chunks else None,
    )
    planned = Attention(TorchAttention(), TorchAttention()).plan(metadata, sequences.kv)
    for _ in range(2):
        out = planned.run(q, LAYER, window)
        pieces = zip([*decode, *chunks], torch.split(q, query_lens), torch.split(out, query_lens), strict=True)
        for slot, query, got in pieces:
            assert torch.allclose(got.double(), sequences.exact(query, slot, window), atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_decode_rows_of_any_length(page_size: int, window: int) -> None:
    check(Sequences([1, 33, 7, 64, 16], page_size), [3, 0, 4, 1, 2], {}, window)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("budget", [1, 3000, 9000])
def test_decode_in_several_groups(window: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_backend.BLOCK_BYTES, "cpu", budget)
    check(Sequences([1, 33, 7, 64, 16, 30], 4), [3, 0, 4, 1, 2, 5], {}, window)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_chunks_from_the_start_and_behind_a_prefix(page_size: int, window: int) -> None:
    check(Sequences([30, 33, 64, 1], page_size), [], {0: 30, 2: 17, 1: 1, 3: 1}, window)
    check(Sequences([20, 9, 31, 12], page_size), [2, 0], {3: 12, 1: 4}, window)  # beside decodes


@pytest.mark.parametrize("window", [0, 300, 2000])
def test_chunks_longer_than_a_block_of_queries(window: int) -> None:
    check(Sequences([1100, 1300], 16), [], {0: 1100, 1: 600}, window)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200))
@settings(deadline=None)
def test_groups_hold_each_row_once_within_the_limit(lens: list[int], limit: int) -> None:
    array = np.array(lens, np.int32)
    groups = split_by_length(array, limit)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lens)))
    assert all(len(group) == 1 or len(group) * array[group].max() <= limit for group in groups)
