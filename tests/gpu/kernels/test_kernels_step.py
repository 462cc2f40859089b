"""The kernels at both ends of a decode step against their references."""

import copy

import pytest
import torch

from minisgl.core import kv_cache as reference
from minisgl.core.kv_cache import DeviceTables, StepInputs
from minisgl.gpu.kernels import decode as kernels

SCRATCH = 5000


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("max_pages", [9, 1500])
def test_rows_are_gathered_and_committed_as_the_reference_does(
    page_size: int, max_pages: int, device: torch.device
) -> None:
    torch.manual_seed(page_size)
    rows, live, batch = 40, 25, 32
    tables = DeviceTables(rows, max_pages, SCRATCH, device)
    tables.last_token.random_(50000)
    tables.length[:rows].random_(max_pages * page_size - 1)
    tables.page_table[:rows].random_(SCRATCH)
    changes = torch.full((3, batch), -1, dtype=torch.int32, device=device)
    changes[0] = rows
    changes[0, :live] = torch.randperm(rows, device=device)[:live]
    grown = changes[0, :live:3].long()
    changes[1, :live:3] = tables.length[grown] // page_size
    changes[2, :live:3] = torch.randint(SCRATCH, (len(grown),), dtype=torch.int32, device=device)
    tokens = torch.randint(50000, (batch,), dtype=torch.int32, device=device)

    wanted_tables, wanted = copy.deepcopy(tables), StepInputs(batch, max_pages, SCRATCH, device)
    reference.gather_rows(changes, wanted_tables, wanted, page_size)
    got = StepInputs(batch, max_pages, SCRATCH, device)
    kernels.gather_rows(changes, tables, got, page_size)
    for name in ("ids", "positions", "kv_lens", "slot_mapping"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    held = torch.arange(max_pages, device=device)[None, :] <= (wanted.positions // page_size)[:, None]
    assert torch.equal(got.page_table[held], wanted.page_table[held])
    assert torch.equal(tables.page_table, wanted_tables.page_table)

    reference.commit_rows(changes, tokens, wanted_tables, wanted)
    kernels.commit_rows(changes, tokens, tables, got)
    assert torch.equal(tables.last_token, wanted_tables.last_token)
    assert torch.equal(tables.length, wanted_tables.length)
    assert tables.length[rows] == 0
