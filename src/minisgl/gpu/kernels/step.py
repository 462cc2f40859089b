"""From the device tables to a captured decode step's inputs, and back. Twins of the same names: `core/kv_cache.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.kv_cache import DeviceTables, StepInputs
from minisgl.gpu.kernels.jit import after_previous, jit, launch_options

BLOCK = 1024


@jit
def _gather_kernel(
    changes: tensor, last_token: tensor, length: tensor, page_table: tensor, ids: tensor, positions: tensor,
    kv_lens: tensor, slot_mapping: tensor, pages: tensor, batch: tensor, width: tensor, page_size: tensor,
    BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0)
    slot = tl.load(changes + row).to(tl.int64)
    new_index = tl.load(changes + batch + row)
    new_page = tl.load(changes + 2 * batch + row)
    position = tl.load(length + slot)
    table = page_table + slot * width
    if new_index >= 0:
        tl.store(table + new_index, new_page)
    tl.store(ids + row, tl.load(last_token + slot))
    tl.store(positions + row, position)
    tl.store(kv_lens + row, position + 1)
    here = position // page_size
    page = tl.where(new_index == here, new_page, tl.load(table + here))
    tl.store(slot_mapping + row, page.to(tl.int64) * page_size + position % page_size)
    for start in range(0, here + 1, BLOCK):
        index = start + tl.arange(0, BLOCK)
        held = tl.load(table + index, mask=index <= here, other=0)
        held = tl.where(index == new_index, new_page, held)
        tl.store(pages + row.to(tl.int64) * width + index, held, mask=index <= here)


def gather_rows(changes: Tensor, tables: DeviceTables, inputs: StepInputs, page_size: int) -> None:
    batch, width = inputs.page_table.shape
    _gather_kernel[(batch,)](
        changes, tables.last_token, tables.length, tables.page_table, inputs.ids, inputs.positions, inputs.kv_lens,
        inputs.slot_mapping, inputs.page_table, batch, width, page_size, BLOCK=BLOCK, num_warps=4, **launch_options(),
    )  # fmt: skip


@jit
def _commit_kernel(
    changes: tensor, tokens: tensor, kv_lens: tensor, last_token: tensor, length: tensor, batch: tensor,
    padding: tensor, BLOCK: constexpr, PDL: constexpr,
) -> None:  # fmt: skip
    after_previous(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = row < batch
    slot = tl.load(changes + row, mask=within, other=0).to(tl.int64)
    live = within & (slot != padding)
    tl.store(last_token + slot, tl.load(tokens + row, mask=within, other=0), mask=live)
    tl.store(length + slot, tl.load(kv_lens + row, mask=within, other=0), mask=live)


def commit_rows(changes: Tensor, tokens: Tensor, tables: DeviceTables, inputs: StepInputs) -> None:
    batch = len(tokens)
    _commit_kernel[(triton.cdiv(batch, BLOCK),)](
        changes, tokens, inputs.kv_lens, tables.last_token, tables.length, batch, len(tables.length) - 1,
        BLOCK=BLOCK, **launch_options(),
    )  # fmt: skip
