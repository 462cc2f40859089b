"""What an answer must be, one token after the other: the engine's side of structured output.

The request table: what the host knows of every running request, one row a request, an array a field.

A row is three integers, `computed <= known <= limit`: tokens whose KV is written by launched steps, tokens
the host has seen, tokens the request may reach. While a step is in flight `computed` may pass `known` by one:
the token it reads is on the device only.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minisgl.core.plan import Int32, RowInit, SpecialInit
from minisgl.core.types import MAX_STOP_TOKEN_IDS, Grammar, Request, TokenLogprobs
from minisgl.errors import InvalidRequestError


class Constraint(Protocol):
    """Follows one answer and says which tokens may come next.

    It allows the ids that end the text itself, where the text may end; it is not told of the stop token that ends the
    request. One that allows nothing ends the request as a stop token does. What either method raises ends only
    this request, with an error.
    """

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Overwrite every word of mask (ceil(V / 32),): bit t % 32 of word t // 32 says whether token t may be next.

        Bits past the vocabulary are not looked at.
        """

    def accept(self, token: int) -> bool:
        """Take in the token that was sampled; False when it was not allowed, which ends the request with an error."""


ConstraintFactory = Callable[[Grammar], Constraint]
"""Raises InvalidRequestError for a grammar that it cannot follow."""


def make_constraint(factory: ConstraintFactory | None, grammar: Grammar) -> Constraint:
    """A constraint for one answer. Raises InvalidRequestError when there is no factory or it refuses the grammar."""
    if factory is None:
        raise InvalidRequestError("this engine was built without structured output", param="grammar")
    try:
        return factory(grammar)
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(f"this {grammar.kind} cannot be followed: {error}", param="grammar") from error


def usable_words(masks: NDArray[np.int32], vocab_size: int) -> None:
    """Clear, in place, the bits of masks (g, ceil(V / 32)) that stand for no token."""
    if rest := vocab_size % 32:
        masks[:, -1] &= np.int32((1 << rest) - 1)


def forbid_tokens(mask: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
    """Clear the bits of these tokens, padded with -1, in one mask."""
    for token in tokens[tokens >= 0].tolist():
        mask[token // 32] &= np.int32(~(1 << token % 32) if token % 32 < 31 else 2**31 - 1)


class State(enum.IntEnum):
    """Where a row is in its life. A leaving row is planned no more; it goes when no launched step touches it."""

    FREE = 0
    PREFILL = 1
    DECODE = 2
    RETRACTING = 3
    ENDED = 4


class Entry:
    """A request from its acceptance to its terminal event; its tokens live here while it has no row.

    `prompt_scores` collects the prompt's log-probabilities until they are delivered; `scored` of its positions are
    in launched steps.
    """

    __slots__ = (
        "arrival", "cached_tokens", "constraint", "counted", "limit", "prompt_scores", "queued_step", "request",
        "scored", "seed", "slot", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        step: int,
        seed: int,
        limit: int,
        eos: tuple[int, ...],
        constraint: Constraint | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.arrival = arrival
        self.queued_step = step
        self.seed = seed
        self.limit = limit
        self.stop_ids = tuple(dict.fromkeys(params.stop_token_ids + (() if params.ignore_eos else eos)))
        self.tokens: Int32 = np.asarray(request.prompt, np.int32)
        self.constraint = constraint
        self.prompt_scores: list[TokenLogprobs | None] = [] if params.prompt_logprobs is None else [None]
        self.scored = 0
        self.cached_tokens = -1
        self.slot = -1
        self.counted = False

    @property
    def rank(self) -> tuple[int, int]:
        """What comes first is admitted first and retracted last."""
        return self.request.priority, self.arrival

    @property
    def reusable(self) -> Int32:
        """Tokens that may come from the prefix cache: a position whose log-probabilities are missing is computed."""
        if self.request.params.prompt_logprobs is None or self.scored >= len(self.request.prompt) - 1:
            return self.tokens
        return self.tokens[: self.scored + 1]

    @property
    def min_len(self) -> int:
        """Positions below this one hold no stop token."""
        return len(self.request.prompt) + self.request.params.min_tokens


class RequestTable:
    """Rows of running requests. Arrays have `rows` entries; `tokens` is (rows, max_seq_len)."""

    def __init__(self, rows: int, max_seq_len: int) -> None:
        self.state = np.zeros(rows, np.int8)
        self.arrival = np.zeros(rows, np.int64)
        self.priority = np.zeros(rows, np.int64)
        self.prefill_len = np.zeros(rows, np.int32)
        self.computed = np.zeros(rows, np.int32)
        self.known = np.zeros(rows, np.int32)
        self.limit = np.zeros(rows, np.int32)
        self.in_flight = np.zeros(rows, np.int32)
        self.greedy = np.zeros(rows, np.bool_)
        self.filtered = np.zeros(rows, np.bool_)
        self.min_len = np.zeros(rows, np.int32)
        self.stop_ids = np.full((rows, MAX_STOP_TOKEN_IDS), -1, np.int32)
        self.penalties = np.zeros((3, rows), np.float32)  # repetition, frequency, presence
        self.penalised = np.zeros(rows, np.bool_)
        self.biases = np.zeros(rows, np.int32)
        self.constrained = np.zeros(rows, np.bool_)
        self.top = np.zeros(rows, np.int32)  # log-probabilities beside the token's own; -1: none at all
        self.scores_prompt = np.zeros(rows, np.bool_)
        self.special = np.zeros(rows, np.bool_)  # any of these
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
        self.priority[slot] = entry.request.priority
        self.prefill_len[slot] = self.known[slot] = length
        self.computed[slot] = cached
        self.limit[slot] = entry.limit
        self.greedy[slot] = params.temperature == 0.0 or params.top_k == 1
        self.filtered[slot] = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        self.min_len[slot] = entry.min_len
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(entry.stop_ids)] = entry.stop_ids
        self.penalties[:, slot] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self.penalised[slot] = tuple(self.penalties[:, slot]) != (1.0, 0.0, 0.0)
        self.biases[slot] = len(params.logit_bias)
        self.constrained[slot] = entry.constraint is not None
        self.top[slot] = -1 if params.logprobs is None else params.logprobs
        self.scores_prompt[slot] = params.prompt_logprobs is not None
        changed = self.penalised[slot] or self.biases[slot] or self.constrained[slot]
        self.special[slot] = changed or self.top[slot] >= 0 or self.scores_prompt[slot]
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
        """Slots in any of these states, the best priority first and of equals the oldest."""
        return self.ranked(np.flatnonzero(np.isin(self.state, states) if len(states) > 1 else self.state == states[0]))

    def ranked(self, slots: NDArray[np.intp]) -> NDArray[np.intp]:
        """These slots, the best priority first and of equals the oldest: the last is the first to be retracted."""
        return slots[np.lexsort((self.arrival[slots], self.priority[slots]))]

    def written(self, slot: int) -> int:
        """Tokens of the row that the host knows and whose KV a launched step has written."""
        return int(min(self.computed[slot], self.known[slot]))

    def init_rows(self, slots: list[int], special: SpecialInit | None = None) -> RowInit | None:
        """What the device must know of newly admitted rows, `special` included; None when there are none."""
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
            special=special,
        )
