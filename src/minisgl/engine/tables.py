"""What the device keeps of every running request between steps, one row each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minisgl.ops.sampling import SamplingRows
from minisgl.types import MAX_STOP_TOKEN_IDS


class DeviceTables:
    """Persistent tensors of `rows + 1` rows; the last is for padding and its page table names only scratch.

    `length` counts the tokens whose KV is written; `last_token` is the one after them, not yet in the cache.
    """

    def __init__(self, rows: int, max_pages: int, scratch_page: int, device: torch.device) -> None:
        def table(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((rows + 1, *shape), dtype=dtype, device=device)

        self.last_token = table(torch.int32)
        self.length = table(torch.int32)
        self.page_table = torch.full((rows + 1, max_pages), scratch_page, dtype=torch.int32, device=device)
        self.sampling = SamplingRows(
            temperature=table(torch.float32),
            top_p=table(torch.float32).fill_(1.0),
            min_p=table(torch.float32),
            top_k=table(torch.int32),
            seed=table(torch.int64),
            min_len=table(torch.int32),
            stop_ids=table(torch.int32, MAX_STOP_TOKEN_IDS).fill_(-1),
        )

    def write_sampling(self, slots: Tensor, values: Mapping[str, Tensor]) -> None:
        """Set the sampling parameters of newly admitted rows, by the field names of SamplingRows."""
        for name, value in values.items():
            getattr(self.sampling, name).index_copy_(0, slots, value)

    def write_pages(self, slots: Tensor, indices: Tensor, pages: Tensor) -> None:
        """page_table[slots, indices] = pages."""
        self.page_table.index_put_((slots, indices), pages)

    def locations(self, slots: Tensor, positions: Tensor, page_size: int) -> Tensor:
        """Where positions of rows lie in the cache: int64 (T,) = page * page_size + offset."""
        indices = slots * self.page_table.shape[1] + positions // page_size
        pages = self.page_table.view(-1).index_select(0, indices)
        return pages.long() * page_size + positions % page_size
