"""Random paged caches with rows over them, for comparing attention backends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisgl.core.attention import SequenceBatch
from minisgl.core.kv_cache import KVCache


@dataclass
class Case:
    """Queries of some rows over a cache of two layers; `decode` when each row has one query."""

    q: Tensor
    kv: KVCache
    rows: SequenceBatch
    decode: bool


def random_case(
    kv_lens: Sequence[int], query_lens: Sequence[int] | None, kv_heads: int, group: int, head_dim: int, page_size: int,
    dtype: torch.dtype, device: torch.device, seed: int = 0,
) -> Case:  # fmt: skip
    """Rows of these lengths on shuffled pages of their own; NaN wherever nobody may look."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lens = np.array(kv_lens, np.int32)
    queries = np.ones_like(lens) if query_lens is None else np.array(query_lens, np.int32)
    counts = -(-lens // page_size)
    used = int(counts.sum())
    pages = generator.permutation(used + 3).astype(np.int32)
    table = np.full((len(lens), int(counts.max()) + 20), used + 3, np.int32)  # the scratch page
    shape = (2, used + 4, page_size, kv_heads, head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    place = 0
    for row, count, length in zip(table, counts, lens, strict=True):
        mine = torch.from_numpy(pages[place : place + count].astype(np.int64)).to(device)
        row[:count] = pages[place : place + count]
        for cache in (k, v):
            tokens = torch.zeros(2, count * page_size, kv_heads, head_dim, dtype=dtype, device=device)
            tokens[:, :length] = torch.randn(2, int(length), kv_heads, head_dim, device=device).to(dtype)
            cache[:, mine] = tokens.view(2, count, page_size, kv_heads, head_dim)
        place += count
    k[:, -1], v[:, -1] = 0, 0
    q = torch.randn(int(queries.sum()), kv_heads * group, head_dim, device=device).to(dtype)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    on_device = [torch.from_numpy(array).to(device) for array in (table, starts, lens)]
    rows = SequenceBatch(
        page_table=on_device[0], query_lens=queries, kv_lens=lens, cu_query_lens=on_device[1],
        kv_lens_device=on_device[2],
    )  # fmt: skip
    return Case(q, KVCache(k, v), rows, query_lens is None)
