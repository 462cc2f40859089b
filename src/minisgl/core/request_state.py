"""What the host knows of every request: its state from acceptance to end, and a table of those that are running.

A row's progress is three integers, `num_computed_tokens <= num_tokens <= max_tokens`. While a step is in flight the
first may pass the second by one: the token it reads is on the device only.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from minisgl.core.pages import CacheManager, Slots
from minisgl.core.plan import EMPTY, PENALTIES, Int32, LogitsInit, LogitsRows, NewRows, Scores, StepPlan, StepResult
from minisgl.core.radix_cache import Node
from minisgl.core.types import MAX_STOP_TOKEN_IDS, Grammar, Request, SamplingParams, TokenLogprobs
from minisgl.errors import InvalidRequestError


class Constraint(Protocol):
    """Follows one completion and says which tokens may come next.

    It allows the ids that end the text itself, where the text may end; it is not told of the stop token that ends the
    request. One that allows nothing ends the request as a stop token does. What either method raises ends only
    this request, with an error.
    """

    @property
    def seconds(self) -> float:
        """CPU time that the last mask and the token before it took."""

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Overwrite mask (ceil(V / 32),): bit t % 32 of word t // 32 says whether token t may be next."""

    def accept(self, token: int) -> bool:
        """Take in the token that was sampled; False when it was not allowed, which ends the request with an error."""


ConstraintFactory = Callable[[Grammar], Constraint]  # raises InvalidRequestError for a grammar that it cannot follow


def make_constraint(factory: ConstraintFactory | None, grammar: Grammar) -> Constraint:
    """Raises InvalidRequestError without a factory or when it refuses the grammar."""
    if factory is None:
        raise InvalidRequestError("this engine was built without structured output", param="grammar")
    try:
        return factory(grammar)
    except InvalidRequestError:
        raise
    except Exception as error:
        raise InvalidRequestError(f"this {grammar.kind} cannot be followed: {error}", param="grammar") from error


def mask_out(mask: NDArray[np.int32], token: int) -> None:
    mask[token // 32] &= ~np.uint32(1 << token % 32).view(np.int32)


class TokenFilter:
    """The constraint of `allowed_token_ids` and `bad_word_ids`, beside that of a grammar."""

    def __init__(self, params: SamplingParams, vocab_size: int, grammar: Constraint | None) -> None:
        self._grammar = grammar
        allowed = np.full(vocab_size, params.allowed_token_ids is None)
        allowed[list(params.allowed_token_ids or ())] = True
        self._endings: dict[tuple[int, ...], set[int]] = {}  # what must not follow these tokens
        for *before, last in params.bad_word_ids:
            if last < vocab_size and before:
                self._endings.setdefault(tuple(before), set()).add(last)
            elif last < vocab_size:
                allowed[last] = False
        bits = np.packbits(allowed, bitorder="little")
        self._mask = np.pad(bits, (0, -len(bits) % 4)).view(np.int32)
        self._lengths = sorted({len(before) for before in self._endings})
        self._said: list[int] = []

    def fill(self, mask: NDArray[np.int32]) -> None:
        if self._grammar is None:
            mask[:] = self._mask
        else:
            self._grammar.fill(mask)
            mask &= self._mask
        for length in self._lengths:
            for token in self._endings.get(tuple(self._said[-length:]), ()):
                mask_out(mask, token)

    def accept(self, token: int) -> bool:
        self._said.append(token)
        return self._grammar is None or self._grammar.accept(token)

    @property
    def seconds(self) -> float:
        return 0.0 if self._grammar is None else self._grammar.seconds


@dataclass
class MaskBudget:
    seconds: float  # of CPU time that the masks of a completion may still take, of all its choices together


class State:
    """The state of a row. A HELD one is not planned before it has its mask, and one whose LAST token is launched not at
    all any more; so these are not retracted either.

    Plain numbers: to compare an array with a member of an enum takes 4 µs longer.
    """

    FREE: Final = 0
    PREFILL: Final = 1
    DECODE: Final = 2
    HELD: Final = 3
    LAST: Final = 4


@dataclass(eq=False)
class RequestState:
    """A request from its acceptance to its terminal event; its tokens live here while it has no row."""

    request: Request
    arrival: int  # its number
    arrived_at: float  # s on the engine's clock
    seed: int
    max_tokens: int  # with the prompt
    stop_ids: tuple[int, ...]
    constraint: Constraint | None = None
    admitted: bool = False
    cached_tokens: int = 0  # of its first admission
    slot: int = -1

    def __post_init__(self) -> None:
        self.tokens: Int32 = np.frombuffer(self.request.prompt_bytes, np.int32)
        self.prompt_len = len(self.tokens)
        # Positions below this one hold no stop token.
        self.min_len = min(self.prompt_len + self.request.params.min_tokens, self.max_tokens)
        self.priority = self.request.priority
        # The lowest is admitted first and retracted last.
        self.sort_key: tuple[tuple[float, ...], int] = ((self.priority,), self.arrival)
        # Of a prompt that is to be scored, until they are delivered with the first token.
        self.prompt_scores: list[TokenLogprobs | None] = [] if self.request.params.prompt_logprobs is None else [None]
        self.num_followed = self.prompt_len  # tokens that the constraint has taken in
        self.mask: Int32 | None = None  # of the next token if it was computed early
        self.mask_budget: MaskBudget | None = None
        self._prefix: Node | None = None  # the last answer of `cached_prefix`

    def cached_prefix(self, cache: CacheManager) -> Node:
        """The node of the prefix tree that ends what a row could start on: nothing of a prompt that is to be scored."""
        self._prefix = cache.match(self.tokens[:0] if self.prompt_scores else self.tokens, self._prefix)
        return self._prefix


class RequestTable:
    """Rows of running requests. Arrays have `rows` entries; `tokens` is (rows, max_seq_len)."""

    def __init__(self, rows: int, max_seq_len: int) -> None:
        self.state = np.zeros(rows, np.int8)
        self.prefill_len = np.zeros(rows, np.int32)
        self.num_computed_tokens = np.zeros(rows, np.int32)  # whose KV is written by launched steps
        self.num_tokens = np.zeros(rows, np.int32)  # that the host has seen
        self.max_tokens = np.zeros(rows, np.int32)  # that the request may reach, prompt included
        self.first_step = np.zeros(rows, np.int64)  # that computed anything for the request that has the row now
        self.stop_ids = np.full((rows, MAX_STOP_TOKEN_IDS), -1, np.int32)
        self.penalties = np.zeros((len(PENALTIES), rows), np.float32)
        self.penalised = np.zeros(rows, np.bool_)
        self.biases = np.zeros(rows, np.int32)
        self.constrained = np.zeros(rows, np.bool_)
        self.mask_seconds = np.zeros(rows, np.float64)  # what the last mask took
        self.held_since = np.zeros(rows, np.int64)  # the step in which a HELD row became one
        self.top = np.zeros(rows, np.int32)  # log-probabilities beside the token's own; -1: none at all
        self.prompt_top = np.zeros(rows, np.int32)  # the same of the prompt
        self.changed = np.zeros(rows, np.bool_)  # penalised, biased or constrained: its logits are
        self.processed = np.zeros(rows, np.bool_)  # changed or with log-probabilities
        self.tokens = np.zeros((rows, max_seq_len), np.int32)
        self.requests: list[RequestState | None] = [None] * rows
        self.free = deque(range(rows))  # the next one to be given first

    def admit(self, request: RequestState, cached: int, step: int) -> None:
        """Give the request the next row from this step on; its first `cached` tokens are in the cache already."""
        slot = self.free.popleft()
        params, length = request.request.params, len(request.tokens)
        self.state[slot] = State.PREFILL
        self.prefill_len[slot] = self.num_tokens[slot] = length
        self.num_computed_tokens[slot] = cached
        self.max_tokens[slot] = request.max_tokens
        self.first_step[slot] = step
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        self.penalties[:, slot] = [getattr(params, name) for name in PENALTIES]
        self.penalised[slot] = self.penalties[:, slot].tolist() != list(PENALTIES.values())
        self.biases[slot] = len(params.logit_bias)
        self.constrained[slot] = request.constraint is not None
        self.mask_seconds[slot] = 0.0
        self.top[slot] = -1 if params.logprobs is None else params.logprobs
        self.prompt_top[slot] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
        self.changed[slot] = self.penalised[slot] or self.biases[slot] or self.constrained[slot]
        self.processed[slot] = self.changed[slot] or self.top[slot] >= 0 or self.prompt_top[slot] >= 0
        self.tokens[slot, :length] = request.tokens
        self.requests[slot] = request
        request.slot = slot

    def vacate(self, slot: int) -> None:
        """Free a row; the caller has released its pages."""
        request = self.request(slot)
        request.tokens = self.tokens[slot, : self.num_tokens[slot]].copy()
        if request.prompt_scores:
            request.prompt_scores = [None]  # the whole prompt is computed again
        request.slot = -1
        self.requests[slot] = None
        self.state[slot] = State.FREE
        self.free.append(slot)

    def request(self, slot: int) -> RequestState:
        request = self.requests[slot]
        assert request is not None, f"row {slot} is free"
        return request

    def unchanged_since(self, slots: Int32, step: int) -> NDArray[np.bool_]:
        """Whether each of these rows still has the request that it had in this step."""
        same: NDArray[np.bool_] = (self.state[slots] != State.FREE) & (self.first_step[slots] <= step)
        return same

    def rows_in(self, *states: int) -> Slots:
        found: NDArray[np.bool_] = self.state == states[0]
        for state in states[1:]:  # faster than isin
            found |= self.state == state
        return found.nonzero()[0]

    def requests_in(self, *states: int) -> list[RequestState]:
        return [self.request(slot) for slot in self.rows_in(*states).tolist()]

    def new_rows(self, slots: list[int]) -> NewRows | None:
        if not slots:
            return None
        requests = [self.request(slot) for slot in slots]
        params = [request.request.params for request in requests]
        sampling: dict[str, NDArray[Any]] = {
            "temperature": np.array([p.temperature for p in params], np.float32),
            "top_p": np.array([p.top_p for p in params], np.float32),
            "min_p": np.array([p.min_p for p in params], np.float32),
            "top_k": np.array([max(p.top_k, 0) for p in params], np.int32),
            "seed": np.array([r.seed & (2**64 - 1) for r in requests], np.uint64).view(np.int64),
            "min_len": np.array([r.min_len for r in requests], np.int32),
            "stop_ids": self.stop_ids[slots],
        }
        return NewRows(slots=np.array(slots, np.int32), sampling=sampling, logits=self._new_logits_rows(slots))

    def _new_logits_rows(self, slots: list[int]) -> LogitsInit | None:
        changed = [slot for slot in slots if self.changed[slot]]
        if not changed:
            return None
        width = int(self.biases[changed].max())
        bias_ids = np.zeros((len(changed), width), np.int32)
        bias_values = np.zeros((len(changed), width), np.float32)
        seen: list[tuple[NDArray[Any], ...]] = []  # of each row: itself, its tokens and their counts
        for index, request in enumerate(map(self.request, changed)):
            slot, bias = request.slot, request.request.params.logit_bias
            bias_ids[index, : len(bias)] = list(bias)
            bias_values[index, : len(bias)] = list(bias.values())
            tokens = self.tokens[slot, : self.num_tokens[slot] if self.penalised[slot] else 0]
            prompt, output = tokens[: request.prompt_len], tokens[request.prompt_len :]
            counts = 2 * np.bincount(output, minlength=int(prompt.max(initial=-1)) + 1)
            counts[prompt] += 1
            distinct = np.flatnonzero(counts)
            seen.append((np.full_like(distinct, slot), distinct, counts[distinct]))
        seen_slots, seen_tokens, seen_counts = (np.concatenate(c).astype(np.int32) for c in zip(*seen, strict=True))
        return LogitsInit(
            slots=np.array(changed, np.int32),
            seen_slots=seen_slots,
            seen_tokens=seen_tokens,
            seen=seen_counts,
            bias_ids=bias_ids,
            bias_values=bias_values,
        )

    def logits_rows(self, sampled: Int32, decodes: int, slots: Int32, starts: Int32, lens: Int32) -> LogitsRows | None:
        """What a step owes to rows that ask for more than sampling, None if nothing.

        The step samples a token for the slots `sampled`. It has so many decodes, and chunks of `lens` tokens of the
        rows `slots`, each behind `starts` tokens.
        """
        if not (self.processed[sampled].any() or self.processed[slots].any()):
            return None
        changed = np.flatnonzero(self.changed[sampled]).astype(np.int32)
        scored = np.flatnonzero(self.top[sampled] >= 0).astype(np.int32)
        rows, targets, prompt_slots = [EMPTY], [EMPTY], [EMPTY]  # of prompt tokens to be scored
        row = decodes  # where a chunk begins among the tokens of the step
        for slot, start, length in zip(slots.tolist(), starts.tolist(), lens.tolist(), strict=True):
            request = self.request(slot)
            last = min(start + length, request.prompt_len - 1)
            if request.prompt_scores and start < last:
                rows.append(np.arange(row, row + last - start, dtype=np.int32))
                targets.append(self.tokens[slot, start + 1 : last + 1].copy())
                prompt_slots.append(np.full(last - start, slot, np.int32))
            row += length
        if not (len(changed) or len(scored) or len(rows) > 1):
            return None
        changed_slots, scored_slots = sampled[changed], np.concatenate(prompt_slots)
        return LogitsRows(
            changed=changed,
            penalties=self.penalties[:, changed_slots],
            penalised=bool(self.penalised[changed_slots].any()),
            bias_width=int(self.biases[changed_slots].max(initial=0)),
            constrained=np.flatnonzero(self.constrained[changed_slots]).astype(np.int32),
            scored=scored,
            top=int(self.top[sampled].max(initial=0)),
            prompt_rows=np.concatenate(rows),
            prompt_targets=np.concatenate(targets),
            prompt_slots=scored_slots,
            prompt_top=int(self.prompt_top[scored_slots].max(initial=0)),
        )

    def take_scores(self, plan: StepPlan, result: StepResult) -> dict[int, TokenLogprobs]:
        """The log-probabilities of the step's tokens by slot; those of prompts go to their requests."""
        if (wanted := plan.logits) is None:
            return {}
        if result.prompt_scores is not None:
            scores = token_logprobs(result.prompt_scores, self.prompt_top[wanted.prompt_slots])
            same = self.unchanged_since(wanted.prompt_slots, plan.step).tolist()
            for slot, score, is_same in zip(wanted.prompt_slots.tolist(), scores, same, strict=True):
                if is_same:
                    self.request(slot).prompt_scores.append(score)
        if result.scores is None:
            return {}
        slots = plan.sampled_slots[wanted.scored]
        return dict(zip(slots.tolist(), token_logprobs(result.scores, self.top[slots]), strict=True))


def token_logprobs(scores: Scores[NDArray[Any]], tops: Int32) -> list[TokenLogprobs]:
    """The scores of each token, with as many of the most probable tokens as were asked for: `tops` (n,)."""
    columns = (column.tolist() for column in (*scores, tops))
    return [
        TokenLogprobs(logprob, tuple(ids[:top]), tuple(logprobs[:top]))
        for logprob, ids, logprobs, top in zip(*columns, strict=True)
    ]
