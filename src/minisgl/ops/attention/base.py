"""What a step's attention is, whoever computes it: its geometry, a backend, and a pair of backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisgl.ops.kv import KVCache

Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows of a step, each a sequence with `query_lens` new tokens at the end of `kv_lens` in the cache.

    All but the page table is known to the host, so that nobody waits for the device. Page-table entries past a
    row's last page are any valid page. Queries lie row after row: T = sum(query_lens).

    On CUDA the last three are given, and no backend copies anything from the host; elsewhere they may be None.
    """

    page_table: Tensor  # int32 (slots, max_pages), on the device
    slots: Int32  # (rows,) on the host: which lines of the page table
    query_lens: Int32  # (rows,) on the host
    kv_lens: Int32  # (rows,) on the host, the new tokens included
    slots_device: Tensor | None = None  # int64 (rows,): slots on the device
    cu_query_lens: Tensor | None = None  # int32 (rows + 1,) on the device: where each row's queries begin, and T
    kv_lens_device: Tensor | None = None  # int32 (rows,): kv_lens on the device


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The attention of one step: decode rows, one query each, then prefill chunks. A part without rows is None."""

    decode: Rows | None
    prefill: Rows | None


class PlannedAttention(Protocol):
    """Attention with a step's geometry worked out once, to be run in every layer."""

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        """Causal attention of q (T, H, hd) over each row's cached keys and values -> (T, H, hd).

        Query head h reads KV head h // (H / K); scores are scaled by hd ** -0.5. With a window w > 0 a token sees
        itself and the w - 1 before it. The new tokens' keys and values are in the cache already.
        """


@dataclass(frozen=True, kw_only=True)
class Projection:
    """What makes rotated queries and keys of a layer's QKV product: the arguments of `rope_store_kv` of these names."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    cos_sin: Tensor | None


@runtime_checkable
class ProjectingAttention(PlannedAttention, Protocol):
    """Attention of decode rows that does the work of `rope_store_kv` too."""

    def begin(self, windows: Sequence[int]) -> None:
        """Prepare a step of layers with these windows, before anything else of the step."""

    def project(self, qkv: Tensor, projection: Projection, layer: int, window: int) -> Tensor:
        """`run` of what `rope_store_kv` makes of qkv (B, (H + 2K) * hd), with each row's last token its new one."""


class AttentionBackend(Protocol):
    """A way to compute attention, for one kind of rows or both."""

    def plan_decode(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Prepare rows with one query each."""

    def plan_prefill(self, rows: Rows, kv: KVCache) -> PlannedAttention:
        """Prepare chunks."""


class Attention:
    """A backend for prefill chunks beside one for decode rows; they may be the same."""

    def __init__(self, prefill: AttentionBackend, decode: AttentionBackend) -> None:
        self.prefill = prefill
        self.decode = decode

    def plan(self, geometry: Geometry, kv: KVCache) -> PlannedAttention:
        """Prepare a step, which has rows of at least one kind."""
        parts: list[tuple[int, PlannedAttention]] = []
        if (rows := geometry.decode) is not None:
            parts.append((len(rows.query_lens), self.decode.plan_decode(rows, kv)))
        if (rows := geometry.prefill) is not None:
            parts.append((int(rows.query_lens.sum()), self.prefill.plan_prefill(rows, kv)))
        return parts[0][1] if len(parts) == 1 else _Parts(parts)


class _Parts:
    """Parts of a step one after the other, each with its number of queries."""

    def __init__(self, parts: list[tuple[int, PlannedAttention]]) -> None:
        self.parts = [part for _, part in parts]
        self.sizes = [size for size, _ in parts]

    def run(self, q: Tensor, layer: int, window: int) -> Tensor:
        pieces = torch.split(q, self.sizes)
        return torch.cat([part.run(piece, layer, window) for part, piece in zip(self.parts, pieces, strict=True)])
