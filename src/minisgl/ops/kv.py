"""The paged keys and values of every layer (PagedAttention, Kwon et al., arXiv 2309.06180)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values, each (layers, num_pages + 1, page_size, KV heads, head_dim).

    The last page, id `num_pages`, is scratch: padding rows write there, and nobody reads what they wrote.
    """

    k: Tensor
    v: Tensor

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[2]

    @property
    def num_pages(self) -> int:
        """Pages a request may own; also the id of the scratch page."""
        return self.k.shape[1] - 1


def page_bytes(num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes that a page takes in all layers, keys and values."""
    return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize


def allocate_kv(
    num_layers: int,
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """A zeroed cache. On the CPU the system gives memory to a page when it is first written."""
    shape = (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim)
    return KVCache(_zeros(shape, dtype, device), _zeros(shape, dtype, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)  # calloc: untouched pages cost nothing
    return torch.from_numpy(raw).view(dtype).view(shape)
