"""What crosses the line between the scheduler and whatever executes a step.

A plan says everything a step needs and nothing about how it is done, in numpy arrays only: the same plan
drives one device, every rank of a tensor-parallel group, and the simulator.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


class RowInit(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters of the rows that a step admits; `n` rows, written before anything else in the step.

    `seeds` holds 64-bit seeds. Ids in `stop_ids` (padded with -1) cannot be sampled at a position below
    `min_lens`, positions counting from the first prompt token.
    """

    slots: Int32  # (n,)
    temperatures: NDArray[np.float32]  # (n,) 0 is greedy
    top_ps: NDArray[np.float32]  # (n,)
    min_ps: NDArray[np.float32]  # (n,)
    top_ks: Int32  # (n,) 0 is off
    seeds: NDArray[np.int64]  # (n,)
    min_lens: Int32  # (n,)
    stop_ids: Int32  # (n, MAX_STOP_TOKEN_IDS)


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step: page-table writes, then one decode token for some rows beside prefill chunks for others.

    A slot is a row of the device tables. A decoding row's token and position are on the device already:
    the plan names its slot only. A chunk writes the KV of positions `start … start + length - 1`; a row
    whose chunk is `final` gets its next token sampled from the chunk's last position.
    """

    step: int
    init: RowInit | None
    page_slots: Int32  # (p,) page_table[page_slots, page_indices] = page_ids
    page_indices: Int32  # (p,)
    page_ids: Int32  # (p,)
    decode_slots: Int32  # (d,)
    prefill_slots: Int32  # (c,)
    prefill_starts: Int32  # (c,) tokens of the row already in the cache
    prefill_lens: Int32  # (c,) tokens in the chunk, at least 1
    prefill_final: NDArray[np.bool_]  # (c,)
    prefill_tokens: Int32  # (sum(prefill_lens),)
    decode_lens: Int32  # (d,) tokens in the cache before this step, as the host knows them
    all_greedy: bool
    any_filter: bool
    any_min_len: bool

    @property
    def sampled_slots(self) -> Int32:
        """Slots that get a token from this step, in the order of the result: decodes, then final chunks."""
        return np.concatenate([self.decode_slots, self.prefill_slots[self.prefill_final]])

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.decode_slots) + len(self.prefill_tokens)


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens a step sampled, in the order of `StepPlan.sampled_slots`."""

    step: int
    tokens: Int32  # (len(sampled_slots),)


class Executor(Protocol):
    """Executes plans in order. `launch` returns before the step is done; `collect` waits for the oldest one.

    A plan may be launched before the result of the one before it is collected. An error in a step is
    raised by the `collect` that would have returned its result.
    """

    @property
    def num_pages(self) -> int:
        """KV pages the scheduler may hand out, ids 0 … num_pages - 1."""

    def launch(self, plan: StepPlan) -> None:
        """Start a step."""

    def collect(self) -> StepResult:
        """Wait for the oldest launched step that was not collected yet."""

    def close(self) -> None:
        """Wait for what is launched and release the device."""
