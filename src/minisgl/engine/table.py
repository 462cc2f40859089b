"""The request table: what the host knows of every running request, one row a request, an array a field.

A row is three integers, `computed <= known <= limit`: tokens whose KV is written by launched steps, tokens
the host has seen, tokens the request may reach. While a step is in flight `computed` may pass `known` by one:
the token it reads is on the device only.
"""

from __future__ import annotations

import enum
from collections import deque

import numpy as np
from numpy.typing import NDArray

from minisgl.engine.plan import Int32, RowInit
from minisgl.types import MAX_STOP_TOKEN_IDS, Request


class State(enum.IntEnum):
    """Where a row is in its life. A leaving row is planned no more; it goes when no launched step touches it."""

    FREE = 0
    PREFILL = 1
    DECODE = 2
    RETRACTING = 3
    ENDED = 4


class Entry:
    """A request from its acceptance to its terminal event; its tokens live here while it has no row."""

    __slots__ = ("arrival", "cached_tokens", "limit", "queued_step", "request", "seed", "slot", "stop_ids", "tokens")

    def __init__(
        self, request: Request, *, arrival: int, step: int, seed: int, limit: int, eos: tuple[int, ...]
    ) -> None:
        params = request.params
        self.request = request
        self.arrival = arrival
        self.queued_step = step
        self.seed = seed
        self.limit = limit
        self.stop_ids = tuple(dict.fromkeys(params.stop_token_ids + (() if params.ignore_eos else eos)))
        self.tokens: Int32 = np.asarray(request.prompt, np.int32)
        self.cached_tokens = -1
        self.slot = -1

    @property
    def min_len(self) -> int:
        """Positions below this one hold no stop token."""
        return len(self.request.prompt) + self.request.params.min_tokens


class RequestTable:
    """Rows of running requests. Arrays have `rows` entries; `tokens` is (rows, max_seq_len)."""

    def __init__(self, rows: int, max_seq_len: int) -> None:
        self.state = np.zeros(rows, np.int8)
        self.arrival = np.zeros(rows, np.int64)
        self.prefill_len = np.zeros(rows, np.int32)
        self.computed = np.zeros(rows, np.int32)
        self.known = np.zeros(rows, np.int32)
        self.limit = np.zeros(rows, np.int32)
        self.in_flight = np.zeros(rows, np.int32)
        self.greedy = np.zeros(rows, np.bool_)
        self.filtered = np.zeros(rows, np.bool_)
        self.min_len = np.zeros(rows, np.int32)
        self.stop_ids = np.full((rows, MAX_STOP_TOKEN_IDS), -1, np.int32)
        self.tokens = np.zeros((rows, max_seq_len), np.int32)
        self.entries: list[Entry | None] = [None] * rows
        self._free = deque(range(rows))

    @property
    def free_rows(self) -> int:
        """How many more requests can run."""
        return len(self._free)

    def peek_row(self) -> int:
        """The row that `admit` will take next."""
        return self._free[0]

    def admit(self, entry: Entry, cached: int) -> int:
        """Give `entry` a row whose first `cached` tokens are in the cache already; return the slot."""
        slot = self._free.popleft()
        params, length = entry.request.params, len(entry.tokens)
        self.state[slot] = State.PREFILL
        self.arrival[slot] = entry.arrival
        self.prefill_len[slot] = self.known[slot] = length
        self.computed[slot] = cached
        self.limit[slot] = entry.limit
        self.greedy[slot] = params.temperature == 0.0 or params.top_k == 1
        self.filtered[slot] = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self.min_len[slot] = entry.min_len
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(entry.stop_ids)] = entry.stop_ids
        self.tokens[slot, :length] = entry.tokens
        self.entries[slot] = entry
        entry.slot = slot
        if entry.cached_tokens < 0:
            entry.cached_tokens = cached
        return slot

    def vacate(self, slot: int) -> None:
        """Free a row; the caller has released its pages."""
        entry = self.entry(slot)
        entry.tokens = self.tokens[slot, : self.known[slot]].copy()
        entry.slot = -1
        self.entries[slot] = None
        self.state[slot] = State.FREE
        self._free.append(slot)

    def entry(self, slot: int) -> Entry:
        """The request in this row."""
        entry = self.entries[slot]
        assert entry is not None, f"row {slot} is free"
        return entry

    def rows_in(self, *states: State) -> NDArray[np.intp]:
        """Slots in any of these states, oldest request first."""
        slots = np.flatnonzero(np.isin(self.state, states) if len(states) > 1 else self.state == states[0])
        return slots[np.argsort(self.arrival[slots], kind="stable")]

    def written(self, slot: int) -> int:
        """Tokens of the row that the host knows and whose KV a launched step has written."""
        return int(min(self.computed[slot], self.known[slot]))

    def init_rows(self, slots: list[int]) -> RowInit | None:
        """What the device must know of newly admitted rows; None when there are none."""
        if not slots:
            return None
        entries = [self.entry(slot) for slot in slots]
        params = [entry.request.params for entry in entries]
        return RowInit(
            slots=np.array(slots, np.int32),
            temperatures=np.array([p.temperature for p in params], np.float32),
            top_ps=np.array([p.top_p for p in params], np.float32),
            min_ps=np.array([p.min_p for p in params], np.float32),
            top_ks=np.array([max(p.top_k, 0) for p in params], np.int32),
            seeds=np.array([e.seed & (2**64 - 1) for e in entries], np.uint64).view(np.int64),
            min_lens=self.min_len[slots],
            stop_ids=self.stop_ids[slots],
        )
