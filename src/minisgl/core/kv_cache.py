"""What the device keeps between steps: the paged keys and values, and a row of tables for each running request."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisgl.core.model_config import ModelSpec
from minisgl.core.sampler import SamplingRows
from minisgl.core.types import MAX_STOP_TOKEN_IDS

ALIGNMENT = 8


@dataclass(frozen=True)
class KVCache:
    """Keys and values, each (layers, num_pages + 1, page_size, KV heads, head_dim).

    The last page, id `num_pages`, is scratch: padding rows write there, and nothing reads it.
    """

    k: Tensor
    v: Tensor

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    @property
    def num_pages(self) -> int:
        """Pages that requests may own; also the id of the scratch page."""
        return self.k.shape[1] - 1


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    return 2 * spec.num_layers * page_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize


def allocate_kv(spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """A zeroed cache. On the CPU a page takes memory when it is first written."""
    shape = (spec.num_layers, num_pages + 1, page_size, spec.num_kv_heads, spec.head_dim)
    if device.type == "cpu":
        size = math.prod(shape) * dtype.itemsize  # by calloc, which gives untouched pages no memory
        k, v = (torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape) for _ in range(2))
    else:
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    return KVCache(k, v)


class DeviceTables:
    """Persistent tensors of `rows + 1` rows; the last is for padding and its page table names only scratch."""

    def __init__(self, rows: int, max_pages: int, scratch_page: int, device: torch.device) -> None:
        def table(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((rows + 1, *shape), dtype=dtype, device=device)

        self.last_token = table(torch.int32)  # the one behind `length`, not yet in the cache
        self.length = table(torch.int32)  # tokens whose KV is written
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

    def slot_mapping(self, slots: Tensor, positions: Tensor, page_size: int) -> Tensor:
        """The places in the cache of positions of rows: int64 (T,) = page * page_size + offset."""
        indices = slots * self.page_table.shape[1] + positions // page_size
        pages = self.page_table.view(-1).index_select(0, indices)
        return pages.long() * page_size + positions % page_size


def upload(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the same names, dtypes and shapes on the device: by one copy, for which the host does not wait.

    On the CPU they share the arrays' memory.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sizes = (-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values())
    starts = list(accumulate(sizes, initial=0))
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    host = packed.numpy()
    for array, start in zip(arrays.values(), starts, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for (name, array), start in zip(arrays.items(), starts, strict=False)
    }
