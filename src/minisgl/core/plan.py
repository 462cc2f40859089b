"""The interface between the scheduler and an executor: the plan of a step, and its result, in numpy arrays."""

from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = TypeVar("Array")
Int32 = NDArray[np.int32]
EMPTY: Final[Int32] = np.empty(0, np.int32)
# Parameters that change logits by a number each, and the number that changes nothing.
PENALTIES: Final = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
Masks = Int32  # (g, ceil(V / 32)): which tokens each of g rows may have next, token t in bit t % 32 of word t // 32


class LogitsInit(msgspec.Struct, frozen=True, kw_only=True):
    """Those admitted rows whose logits are changed before sampling.

    Penalised rows hold m distinct tokens already, counted once a row: a row that was retracted comes with the output
    it had. `w` is the largest number of biases of these rows, and may be 0.
    """

    slots: Int32  # (n,)
    seen_slots: Int32  # (m,)
    seen_tokens: Int32  # (m,)
    seen: Int32  # (m,) twice the token's count in the output, plus one if it is in the prompt
    bias_ids: Int32  # (n, w) padded with 0
    bias_values: NDArray[np.float32]  # (n, w) padded with 0


class NewRows(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of the rows that a step admits; `n` rows, written before anything else in the step."""

    slots: Int32  # (n,)
    sampling: dict[str, NDArray[Any]]  # the fields of `SamplingRows`
    logits: LogitsInit | None = None


class LogitsRows(msgspec.Struct, frozen=True, kw_only=True):
    """What a step does for rows that ask for more than sampling; `core/logits.py` executes it.

    Its rows are indices into `StepPlan.sampled_slots`, in ascending order.
    """

    changed: Int32  # (c,) have their logits changed before a token is sampled
    penalties: NDArray[np.float32]  # (p, c) in the order of PENALTIES, neutral for rows without
    penalised: bool  # whether any penalty is not neutral
    bias_width: int  # the most biases of a changed row
    constrained: Int32  # (g,) indices into `changed`, ascending: they wait for a mask
    scored: Int32  # (s,) want the log-probability of their token
    top: int  # the most that a scored row asks for
    prompt_rows: Int32  # (q,) of the step's tokens, decodes and then chunks, those that score a token of the prompt
    prompt_targets: Int32  # (q,) that token, the next one
    prompt_slots: Int32  # (q,) its row
    prompt_top: int


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step: page-table writes, then one decode token for some rows beside prefill chunks for others.

    A slot is the index of a row in the device tables. A decoding row's token and position are on the device already:
    the plan has its slot only. A chunk writes the KV of positions `start … start + length - 1`; a row whose chunk is
    `final` gets its next token sampled from the chunk's last position.
    """

    step: int
    init: NewRows | None = None
    page_slots: Int32 = EMPTY  # (p,) page_table[page_slots, page_indices] = page_ids
    page_indices: Int32 = EMPTY  # (p,)
    page_ids: Int32 = EMPTY  # (p,)
    decode_slots: Int32 = EMPTY  # (d,)
    decode_lens: Int32 = EMPTY  # (d,) tokens in the cache before this step, as the host knows them
    prefill_slots: Int32 = EMPTY  # (c,)
    prefill_starts: Int32 = EMPTY  # (c,) tokens of the row already in the cache
    prefill_lens: Int32 = EMPTY  # (c,) tokens in the chunk, at least 1
    prefill_final: NDArray[np.bool_] = EMPTY.astype(np.bool_)  # (c,)
    prefill_tokens: Int32 = EMPTY  # (sum(prefill_lens),)
    logits: LogitsRows | None = None
    timed: bool = False

    @property
    def sampled_slots(self) -> Int32:
        """Slots that get a token from this step, in the order of the result: decodes, then final chunks."""
        return np.concatenate([self.decode_slots, self.prefill_slots[self.prefill_final]])

    @property
    def constrained_slots(self) -> Int32:
        """Slots whose next token waits for a mask, in the order of the masks."""
        if self.logits is None:
            return EMPTY
        return self.sampled_slots[self.logits.changed[self.logits.constrained]]

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + len(self.prefill_tokens)


class Scores(NamedTuple, Generic[Array]):
    """Natural log-probabilities of n tokens by the model's own logits, and the most probable tokens beside them."""

    logprobs: Array  # float32 (n,)
    top_ids: Array  # int32 (n, top)
    top_logprobs: Array  # float32 (n, top), highest first


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens a step sampled, in the order of `StepPlan.sampled_slots`, and the scores that `logits` asked for."""

    step: int
    tokens: Int32  # (len(sampled_slots),)
    scores: Scores[NDArray[Any]] | None = None  # of logits.scored
    prompt_scores: Scores[NDArray[Any]] | None = None  # of logits.prompt_rows
    device: tuple[float, float] | None = None  # when the device began and ended, in s, of a `timed` step


class Executor(Protocol):
    """Executes plans in order. `launch` returns before the step is done; `collect` waits for the oldest one.

    A plan may be launched before the result of the one before it is collected. A plan with constrained rows has a
    second half: `finish` must follow its `launch`, before anything else is launched and before it is collected. An
    error in a step is raised by the `collect` that would have returned its result.
    """

    @property
    def num_pages(self) -> int:
        """KV pages the scheduler may hand out, ids 0 … num_pages - 1."""

    def launch(self, plan: StepPlan) -> None: ...

    def finish(self, masks: Masks) -> None:
        """Give the step just launched its masks, one for each constrained row; only their tokens depend on it."""

    def collect(self) -> StepResult: ...

    def close(self) -> None:
        """Wait for what is launched and release the device."""
