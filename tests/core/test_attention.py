import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.attention import Case, random_case
from minisgl.core import attention as torch_backend
from minisgl.core.attention import Attention, SequenceBatch, TorchAttention, split_by_length

GROUP, HEAD_DIM, LAYER = 3, 8, 1


def exact(case: Case, row: int, q: Tensor, window: int) -> Tensor:
    """Attention of the last len(q) tokens of a row, token by token in float64."""
    length, page_size = int(case.rows.kv_lens[row]), case.kv.page_size
    pages = case.rows.page_table[row, : -(-length // page_size)].long()
    tokens = (cache[LAYER, pages].flatten(0, 1)[:length].double() for cache in (case.kv.k, case.kv.v))
    k, v = (values.repeat_interleave(GROUP, dim=1) for values in tokens)
    out = []
    for i, query in enumerate(q.double()):
        last = length - len(q) + i
        first = max(0, last - window + 1) if window else 0
        scores = torch.einsum("hd,thd->ht", query, k[first : last + 1]) / HEAD_DIM**0.5
        out.append(torch.einsum("ht,thd->hd", scores.softmax(dim=-1), v[first : last + 1]))
    return torch.stack(out)


def check(page_size: int, window: int, decode: list[int], chunks: dict[int, int]) -> None:
    """A step over decodes of these lengths and chunks, length: queries, agrees with the exact attention of each row."""
    torch.set_num_threads(1)
    lens, query_lens = [*decode, *chunks], [1] * len(decode) + list(chunks.values())
    case = random_case(lens, query_lens, 2, GROUP, HEAD_DIM, page_size, torch.float32, torch.device("cpu"))

    def rows(part: slice) -> SequenceBatch:
        queries, kv_lens = case.rows.query_lens[part], case.rows.kv_lens[part]
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(queries)]).astype(np.int32))
        return SequenceBatch(
            page_table=case.rows.page_table[part], query_lens=queries, kv_lens=kv_lens, cu_query_lens=starts,
            kv_lens_device=case.rows.kv_lens_device[part],
        )  # fmt: skip

    both = rows(slice(len(decode))), rows(slice(len(decode), None))
    planned = Attention(TorchAttention(), TorchAttention()).plan(*both, case.kv)
    for _ in range(2):
        out = planned.run(case.q, LAYER, window)
        parts = zip(torch.split(case.q, query_lens), torch.split(out, query_lens), strict=True)
        for row, (query, got) in enumerate(parts):
            assert torch.allclose(got.double(), exact(case, row, query, window), atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_decodes_chunks_from_the_start_and_behind_a_prefix_and_both(page_size: int, window: int) -> None:
    check(page_size, window, [64, 1, 16, 33, 7], {})
    check(page_size, window, [], {30: 30, 64: 17, 33: 1, 1: 1})
    check(page_size, window, [31, 20], {12: 12, 9: 4})


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("budget", [1, 3000, 9000])
def test_decode_in_several_groups(window: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_backend.BLOCK_BYTES, "cpu", budget)
    check(4, window, [64, 1, 16, 33, 7, 30], {})


@pytest.mark.parametrize("window", [0, 300, 2000])
def test_chunks_longer_than_a_block_of_queries(window: int) -> None:
    check(16, window, [], {1100: 1100, 1300: 600})


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200))
@settings(deadline=None)
def test_groups_hold_each_row_once_within_the_limit(lens: list[int], limit: int) -> None:
    array = np.array(lens, np.int32)
    groups = split_by_length(array, limit)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lens)))
    assert all(len(group) == 1 or len(group) * array[group].max() <= limit for group in groups)
