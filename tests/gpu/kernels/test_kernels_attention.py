"""Our attention kernels against the torch backend; without a GPU they run in Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.attention import Case, random_case
from minisgl.core.attention import TorchAttention
from minisgl.core.ops import RopeStore, rope_store_kv
from minisgl.gpu.attention.interface import decode_batch, device_batch
from minisgl.gpu.attention.triton import TritonAttention
from minisgl.gpu.kernels.attention import flatten_pages
from minisgl.gpu.kernels.decode import DecodeAttention, DecodeSplit, Workspaces

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("device")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def check(case: Case, window: int) -> None:
    out = TritonAttention(DEVICE).plan(case.rows, case.kv, case.decode).run(case.q, 1, window)
    expected = TorchAttention().plan(case.rows, case.kv, case.decode).run(case.q, 1, window)
    assert out.shape == case.q.shape
    assert torch.linalg.vector_norm(out - expected) <= TOLERANCE[case.q.dtype] * torch.linalg.vector_norm(expected)


# A row is its length, if it has one query, or (queries, length).
@pytest.mark.parametrize(
    ("page_size", "group", "head_dim", "dtype", "rows", "window"),
    [
        (1, 1, 64, torch.float32, (1, 2, 65, 130), 0),
        (16, 2, 128, torch.float16, (300, 16, 17), 0),
        (64, 5, 64, torch.float32, (64, 128, 63, 129, 1), 0),
        (256, 8, 128, torch.float32, (257, 300), 0),
        (16, 8, 64, torch.float32, (300, 100, 5), 70),
        (64, 2, 64, torch.float16, (299, 64), 128),
        (1, 5, 80, torch.float32, (77, 200), 1),
        (3, 17, 16, torch.float32, (31,), 0),
        (1, 1, 64, torch.float32, ((5, 5), (1, 33), (40, 64)), 0),
        (16, 2, 128, torch.float16, ((130, 130), (3, 200)), 0),
        (64, 5, 64, torch.float32, ((1, 1), (60, 190), (64, 64)), 0),
        (256, 8, 64, torch.float16, ((20, 290), (37, 37)), 0),
        (16, 1, 64, torch.float32, ((100, 100), (33, 133)), 20),
        (64, 2, 64, torch.float16, ((90, 180), (2, 3)), 64),
        (3, 3, 48, torch.float32, ((10, 31),), 7),
    ],
)
def test_decode_and_prefill_equal_torch(
    page_size: int, group: int, head_dim: int, dtype: torch.dtype, rows: tuple[Any, ...], window: int
) -> None:
    query_lens, lens = (None, rows) if isinstance(rows[0], int) else zip(*rows, strict=True)
    check(random_case(lens, query_lens, 2, group, head_dim, page_size, dtype, DEVICE), window)


def test_prefill_finds_every_row_among_many() -> None:
    lens = tuple(1 + i % 4 for i in range(150))
    check(random_case(lens, lens, 1, 2, 16, 4, torch.float32, DEVICE), 0)


def test_decode_reads_queries_inside_a_wider_row() -> None:
    case = random_case((20, 33), None, 2, 2, 64, 16, torch.float32, DEVICE)
    case.q = torch.randn(2, 8 * 64, device=DEVICE)[:, : 4 * 64].view(2, 4, 64)
    check(case, 0)


def test_graph_decode_follows_lengths_and_pages_written_later() -> None:
    case = random_case((150, 90), None, 2, 2, 64, 16, torch.float32, DEVICE)
    table = torch.full((2, 20), case.kv.num_pages, dtype=torch.int32, device=DEVICE)
    lens = torch.ones(2, dtype=torch.int32, device=DEVICE)
    graph = TritonAttention(DEVICE).graph_decode(decode_batch(table, lens, 320), case.kv)
    graph.prepare(np.ones(2, np.int32))
    graph.attention.run(case.q, 0, 0)
    table.copy_(case.rows.page_table[:, :20])
    lens.copy_(torch.from_numpy(case.rows.kv_lens))
    graph.prepare(case.rows.kv_lens)
    expected = TorchAttention().plan(case.rows, case.kv, decode=True).run(case.q, 0, 0)
    torch.testing.assert_close(graph.attention.run(case.q, 0, 0), expected, rtol=1e-4, atol=1e-5)


def decode(case: Case, split: DecodeSplit, processors: int = 8) -> DecodeAttention:
    rows = device_batch(case.rows)
    return DecodeAttention(rows, case.kv, Workspaces(DEVICE), processors, split)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("programs", [0, 1, 2, 3, 7, 30, 200])
def test_the_split_of_tiles_does_not_change_the_result(programs: int, tile: int) -> None:
    case = random_case((1, 64, 65, 300, 2, 700), None, 1, 2, 16, 16, torch.float32, DEVICE)
    expected = TorchAttention().plan(case.rows, case.kv, decode=True).run(case.q, 0, 0)
    plan = decode(case, DecodeSplit(tile, 4, 2, programs), processors=1)
    for _ in range(2):  # the second launch finds the counters as the first one did
        torch.testing.assert_close(plan.run(case.q, 0, 0), expected, rtol=1e-4, atol=1e-5)


def test_many_rows_have_programs_of_their_own_where_none_is_far_longer_than_the_others() -> None:
    backend = TritonAttention(DEVICE)

    def shares(rows: int, longest: int) -> bool:
        case = random_case((*(20,) * (rows - 1), longest), None, 8, 1, 16, 16, torch.float32, DEVICE)
        plan = backend.plan(case.rows, case.kv, decode=True)
        assert isinstance(plan, DecodeAttention)
        return plan.split.programs > 0

    assert [shares(150, 20), shares(150, 90), shares(150, 110), shares(100, 20)] == [False, False, True, True]


def test_layers_with_and_without_a_window_alternate() -> None:
    case = random_case((40, 3, 150), None, 2, 2, 16, 16, torch.float32, DEVICE)
    plan, reference = decode(case, DecodeSplit(16, 4, 2, 3)), TorchAttention().plan(case.rows, case.kv, decode=True)
    for layer, window in ((0, 0), (1, 33), (0, 33), (1, 0)):
        expected = reference.run(case.q, layer, window)
        torch.testing.assert_close(plan.run(case.q, layer, window), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", [0, 3])
@pytest.mark.parametrize(
    ("page_size", "group", "head_dim", "dtype", "lens", "window", "norm"),
    [
        (16, 2, 128, torch.float16, (300, 16, 17, 1), 0, True),
        (1, 5, 64, torch.float32, (1, 2, 65, 130), 0, True),
        (64, 1, 80, torch.float32, (64, 129, 65), 0, False),
        (16, 8, 64, torch.float32, (300, 100, 5), 70, True),
        (3, 2, 16, torch.float32, (31, 4, 1), 1, False),
    ],
)
def test_decode_from_the_qkv_gemm_equals_rope_store_and_attention(
    page_size: int, group: int, head_dim: int, dtype: torch.dtype, lens: tuple[int, ...], window: int, norm: bool,
    programs: int,
) -> None:  # fmt: skip
    case = random_case(lens, None, 2, group, head_dim, page_size, dtype, DEVICE)
    plan, layer = decode(case, DecodeSplit(16, 4, 2, programs)), 1
    positions = plan.kv_lens - 1
    pages = plan.page_table.gather(1, (positions // page_size).long().unsqueeze(1)).squeeze(1).long()
    slot_mapping = pages * page_size + positions % page_size
    qkv = torch.randn(len(lens), (2 * group + 4) * head_dim, device=DEVICE).to(dtype)
    q_norm, k_norm = (torch.randn(head_dim, device=DEVICE).to(dtype) if norm else None for _ in range(2))
    cos_sin = torch.randn(320, head_dim, device=DEVICE)
    k, v = case.kv.k[layer].clone(), case.kv.v[layer].clone()
    rope = RopeStore(rope_store_kv, q_norm, k_norm, 1e-6, cos_sin, positions, slot_mapping, k, v)
    plan.begin([0, window])
    out = plan.run_qkv(qkv, rope, layer, window)
    q = rope(qkv)
    torch.testing.assert_close(case.kv.k[layer], k, equal_nan=True)
    torch.testing.assert_close(case.kv.v[layer], v, equal_nan=True, rtol=0, atol=0)
    expected = TorchAttention().plan(case.rows, case.kv, decode=True).run(q, layer, window)
    assert torch.linalg.vector_norm(out - expected) <= TOLERANCE[dtype] * torch.linalg.vector_norm(expected)


def test_flattened_pages_are_those_of_each_row() -> None:
    table = torch.arange(300 * 8, dtype=torch.int32, device=DEVICE).view(300, 8)
    lens = torch.tensor([1 + i % 29 for i in range(300)], dtype=torch.int32, device=DEVICE)
    starts, filled = (torch.empty(n, dtype=torch.int32, device=DEVICE) for n in (301, 300))
    pages = torch.empty(300 * 8, dtype=torch.int32, device=DEVICE)
    flatten_pages(table, lens, 4, starts, pages, filled)
    counts = (lens + 3) // 4
    assert starts.tolist() == [0, *counts.cumsum(0).tolist()]
    held = [page for row, count in zip(table, counts, strict=True) for page in row[:count].tolist()]
    assert pages[: int(starts[-1])].tolist() == held
    assert filled.tolist() == ((lens - 1) % 4 + 1).tolist()
