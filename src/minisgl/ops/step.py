"""What a decode step reads from the device tables and writes back to them, in plain torch.

A step's `changes` is all the host sends for it: int32 (3, B), the rows' slots, the index in its page table at which a
row gets a new page (-1: none), and that page. The last row of the tables is for padding and never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TableTensors(Protocol):
    """The tables' tensors that a decode step touches: int32 (S,), int32 (S,), int32 (S, max_pages)."""

    last_token: Tensor
    length: Tensor
    page_table: Tensor


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a decode step of B rows starts from, in tensors that stay where they are."""

    ids: Tensor  # int32 (B,)
    positions: Tensor  # int32 (B,)
    kv_lens: Tensor  # int32 (B,) the new token included
    locations: Tensor  # int64 (B,) page * page_size + offset of the new token
    page_table: Tensor  # int32 (B, max_pages); behind a row's last page lies any valid page

    @classmethod
    def allocate(cls, batch: int, max_pages: int, scratch_page: int, device: torch.device) -> StepInputs:
        """Inputs of `batch` rows that all point at the scratch page."""
        return cls(
            ids=torch.zeros(batch, dtype=torch.int32, device=device),
            positions=torch.zeros(batch, dtype=torch.int32, device=device),
            kv_lens=torch.ones(batch, dtype=torch.int32, device=device),
            locations=torch.zeros(batch, dtype=torch.int64, device=device),
            page_table=torch.full((batch, max_pages), scratch_page, dtype=torch.int32, device=device),
        )


def gather_rows(changes: Tensor, tables: TableTensors, inputs: StepInputs, page_size: int) -> None:
    """Write new pages into the tables, and the rows' token, position, location and pages into `inputs`."""
    slots, new_index, new_page = changes.long()
    grows = new_index >= 0
    tables.page_table[slots[grows], new_index[grows]] = new_page[grows].int()
    lengths = tables.length[slots]
    pages = tables.page_table[slots]
    inputs.ids.copy_(tables.last_token[slots])
    inputs.positions.copy_(lengths)
    inputs.kv_lens.copy_(lengths + 1)
    inputs.page_table.copy_(pages)
    here = pages.gather(1, (lengths // page_size).long().unsqueeze(1)).squeeze(1)
    inputs.locations.copy_(here.long() * page_size + lengths % page_size)


def commit_rows(changes: Tensor, tokens: Tensor, tables: TableTensors, inputs: StepInputs) -> None:
    """Write the sampled tokens int32 (B,) and the new lengths back to the rows that are not padding."""
    slots = changes[0].long()
    live = slots != len(tables.length) - 1
    tables.last_token[slots[live]] = tokens[live]
    tables.length[slots[live]] = inputs.kv_lens[live]
