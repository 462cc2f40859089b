"""Our attention kernels against the torch backend; without a CUDA card they run in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.attention import Case, random_case
from minisgl.ops.attention.torch_backend import TorchAttention
from minisgl.ops.attention.triton_backend import TritonAttention
from minisgl.ops.kernels.attention import decode_attention, decode_splits, flatten_pages

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def check(case: Case, window: int) -> None:
    backend, reference = TritonAttention(DEVICE), TorchAttention()
    plan = "plan_decode" if case.decode else "plan_prefill"
    out = getattr(backend, plan)(case.rows, case.kv).run(case.q, 1, window)
    expected = getattr(reference, plan)(case.rows, case.kv).run(case.q, 1, window)
    assert out.shape == case.q.shape
    assert torch.linalg.vector_norm(out - expected) <= TOLERANCE[case.q.dtype] * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize(
    ("page_size", "group", "head_dim", "dtype", "lens", "window"),
    [
        (1, 1, 64, torch.float32, (1, 2, 65, 130), 0),
        (16, 2, 128, torch.float16, (300, 16, 17), 0),
        (64, 5, 64, torch.float32, (64, 128, 63, 129, 1), 0),
        (256, 8, 128, torch.float32, (257, 300), 0),
        (16, 8, 64, torch.float32, (300, 100, 5), 70),
        (64, 2, 64, torch.float16, (299, 64), 128),
        (1, 5, 80, torch.float32, (77, 200), 1),
        (3, 17, 16, torch.float32, (31,), 0),
    ],
)
def test_decode_equals_torch(
    page_size: int, group: int, head_dim: int, dtype: torch.dtype, lens: tuple[int, ...], window: int
) -> None:
    check(random_case(lens, None, 2, group, head_dim, page_size, dtype, DEVICE), window)


@pytest.mark.parametrize(
    ("page_size", "group", "head_dim", "dtype", "chunks", "window"),
    [
        (1, 1, 64, torch.float32, ((5, 5), (1, 33), (40, 64)), 0),
        (16, 2, 128, torch.float16, ((130, 130), (3, 200)), 0),
        (64, 5, 64, torch.float32, ((1, 1), (60, 190), (64, 64)), 0),
        (256, 8, 64, torch.float16, ((20, 290), (37, 37)), 0),
        (16, 1, 64, torch.float32, ((100, 100), (33, 133)), 20),
        (64, 2, 64, torch.float16, ((90, 180), (2, 3)), 64),
        (3, 3, 48, torch.float32, ((10, 31),), 7),
    ],
)
def test_prefill_equals_torch(
    page_size: int, group: int, head_dim: int, dtype: torch.dtype, chunks: tuple[tuple[int, int], ...], window: int
) -> None:
    query_lens, lens = zip(*chunks, strict=True)
    check(random_case(lens, query_lens, 2, group, head_dim, page_size, dtype, DEVICE), window)


def test_prefill_finds_every_row_among_many() -> None:
    count = 150
    lens = tuple(1 + i % 4 for i in range(count))
    check(random_case(lens, lens, 1, 2, 16, 4, torch.float32, DEVICE), 0)


def test_decode_reads_queries_inside_a_wider_row() -> None:
    case = random_case((20, 33), None, 2, 2, 64, 16, torch.float32, DEVICE)
    wide = torch.randn(2, 8 * 64, device=DEVICE)
    case.q = wide[:, : 4 * 64].view(2, 4, 64)
    check(case, 0)


def test_graph_decode_follows_lengths_and_pages_written_later() -> None:
    case = random_case((150, 90), None, 2, 2, 64, 16, torch.float32, DEVICE)
    table = torch.full((2, 20), case.kv.num_pages, dtype=torch.int32, device=DEVICE)
    lens = torch.ones(2, dtype=torch.int32, device=DEVICE)
    graph = TritonAttention(DEVICE).graph_decode(table, lens, case.kv, 320)
    graph.prepare(np.ones(2, np.int32))
    graph.attention.run(case.q, 0, 0)
    table.copy_(case.rows.page_table[torch.from_numpy(case.rows.slots.astype(np.int64)), :20])
    lens.copy_(torch.from_numpy(case.rows.kv_lens))
    graph.prepare(case.rows.kv_lens)
    expected = TorchAttention().plan_decode(case.rows, case.kv).run(case.q, 0, 0)
    torch.testing.assert_close(graph.attention.run(case.q, 0, 0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 16, 64])
def test_splits_do_not_change_the_answer(splits: int) -> None:
    case = random_case((1, 64, 65, 300, 1300), None, 1, 2, 16, 16, torch.float32, DEVICE)
    table = case.rows.page_table[torch.from_numpy(case.rows.slots.astype(np.int64))]
    lens = torch.from_numpy(case.rows.kv_lens).to(DEVICE)
    out = decode_attention(case.q, case.kv.k[0], case.kv.v[0], table, lens, window=0, splits=splits)
    expected = TorchAttention().plan_decode(case.rows, case.kv).run(case.q, 0, 0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_splits_fill_the_card_for_few_rows_and_vanish_for_many() -> None:
    assert decode_splits(1, 8, 40960, 132) == 32
    assert decode_splits(1, 2, 40960, 132) == 64
    assert decode_splits(1, 8, 600, 132) == 16
    assert decode_splits(8, 8, 40960, 132) == 8
    assert decode_splits(256, 8, 40960, 132) == 1


def test_flattened_pages_name_each_row_in_turn() -> None:
    table = torch.arange(300 * 8, dtype=torch.int32, device=DEVICE).view(300, 8)
    lens = torch.tensor([1 + i % 29 for i in range(300)], dtype=torch.int32, device=DEVICE)
    starts, filled = (torch.empty(n, dtype=torch.int32, device=DEVICE) for n in (301, 300))
    pages = torch.empty(300 * 8, dtype=torch.int32, device=DEVICE)
    flatten_pages(table, lens, 4, starts, pages, filled)
    counts = (lens + 3) // 4
    assert starts.tolist() == [0, *counts.cumsum(0).tolist()]
    assert pages[: int(starts[-1])].tolist() == [
        p for r, n in enumerate(counts.tolist()) for p in table[r, :n].tolist()
    ]
    assert filled.tolist() == ((lens - 1) % 4 + 1).tolist()
