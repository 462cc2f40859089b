"""The decode step's inputs against the device tables' own arithmetic."""

from __future__ import annotations

import pytest
import torch

from minisgl.ops.kernels.rows import advance


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_advance_by_one_token_and_padding_stays(
    page_size: int, index_dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(page_size)
    rows, max_pages, scratch = 200, 9, 5000
    last_token = torch.randint(50000, (rows + 1,), dtype=torch.int32, device=device)
    length = torch.randint(max_pages * page_size, (rows + 1,), dtype=torch.int32, device=device)
    length[rows] = 0
    page_table = torch.randint(scratch, (rows + 1, max_pages), dtype=torch.int32, device=device)
    page_table[rows] = scratch
    real = torch.randperm(rows, device=device)[:150]
    slots = torch.cat([real, torch.full((10,), rows, device=device)])
    before = length.clone()

    ids, positions, following, locations = advance(slots.to(index_dtype), last_token, length, page_table, page_size)
    assert torch.equal(ids, last_token[slots])
    assert torch.equal(positions, before[slots])
    assert torch.equal(following, before[slots] + 1)
    pages = page_table[slots, (before[slots] // page_size).long()].long()
    assert torch.equal(locations, pages * page_size + before[slots] % page_size)
    before[real] += 1
    assert torch.equal(length, before)


def test_no_rows_change_nothing(device: torch.device) -> None:
    length = torch.arange(3, dtype=torch.int32, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    assert [len(part) for part in advance(none, length, length, length.view(3, 1), 16)] == [0, 0, 0, 0]
    assert length.tolist() == [0, 1, 2]
