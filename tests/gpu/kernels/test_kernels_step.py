"""The kernels at both ends of a decode step against what they do in plain torch."""

import pytest
import torch

from minisgl.core.decoder import ForwardBatch
from minisgl.core.kv_cache import DeviceTables
from minisgl.gpu.attention.interface import decode_batch
from minisgl.gpu.kernels.decode import commit_rows, gather_rows

SCRATCH = 5000


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("max_pages", [9, 1500])
def test_rows_are_gathered_and_committed(page_size: int, max_pages: int, device: torch.device) -> None:
    torch.manual_seed(page_size)
    rows, live, count = 40, 25, 32
    tables = DeviceTables(rows, max_pages, SCRATCH, device)
    tables.last_token.random_(50000)
    tables.length[:rows].random_(max_pages * page_size - 1)
    tables.page_table[:rows].random_(SCRATCH)
    changes = torch.full((3, count), -1, dtype=torch.int32, device=device)
    changes[0] = rows
    changes[0, :live] = torch.randperm(rows, device=device)[:live]
    slots = changes[0].long()
    lengths, grown = tables.length[slots], slots[:live:3]
    changes[1, :live:3] = tables.length[grown] // page_size
    changes[2, :live:3] = torch.randint(SCRATCH, (len(grown),), dtype=torch.int32, device=device)
    page_table = tables.page_table.clone()
    page_table[grown, changes[1, :live:3].long()] = changes[2, :live:3]

    ids, positions, kv_lens = (torch.zeros(count, dtype=torch.int32, device=device) for _ in range(3))
    batch = ForwardBatch(ids=ids, positions=positions, slot_mapping=ids.long(), logits_indices=None)
    there = decode_batch(torch.full((count, max_pages), SCRATCH, dtype=torch.int32, device=device), kv_lens, max_pages)
    gather_rows(changes, tables, batch, there, page_size)
    assert torch.equal(tables.page_table, page_table)
    assert torch.equal(ids, tables.last_token[slots])
    assert torch.equal(positions, lengths)
    assert torch.equal(kv_lens, lengths + 1)
    assert torch.equal(batch.slot_mapping, tables.slot_mapping(slots, lengths, page_size))
    held = torch.arange(max_pages, device=device)[None, :] <= (lengths // page_size)[:, None]
    assert torch.equal(there.page_table[held], page_table[slots][held])

    tokens = torch.randint(50000, (count,), dtype=torch.int32, device=device)
    last_token, length = tables.last_token.clone(), tables.length.clone()
    last_token[slots[:live]], length[slots[:live]] = tokens[:live], lengths[:live] + 1
    commit_rows(changes, tokens, tables, there)
    assert torch.equal(tables.last_token, last_token)
    assert torch.equal(tables.length, length)
