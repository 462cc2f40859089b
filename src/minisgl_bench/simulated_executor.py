"""Executors without a device: one computes tokens from the pages as a device reads them, one takes virtual time."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from minisgl.core.plan import Int32, Masks, Scores, StepPlan, StepResult

SPREAD = 0x9E3779B1  # odd: step numbers times it go through all 32-bit numbers


class SimulatedExecutor:
    """Executes plans on token ids in place of keys and values, and hashes in place of kernels.

    It keeps its tables and pages exactly as a real device would, and makes the next token a hash of the whole prefix
    *as read through the page table*. So a page handed out twice, freed too early or shared wrongly changes the tokens.
    Masks are obeyed: the token is the next one that is allowed. A token's log-probability is minus its id, and the most
    probable tokens are 0, 1, 2, …; penalties and biases change nothing.
    """

    def __init__(self, num_pages: int, page_size: int, rows: int, max_seq_len: int, vocab_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.page_table = np.full((rows, -(-max_seq_len // page_size)), -1, np.int32)
        self.length = np.zeros(rows, np.int32)
        self.last_token = np.zeros(rows, np.int32)
        self.seed = np.zeros(rows, np.int64)
        self.stop_ids = np.full((rows, 1), -1, np.int32)
        self.min_len = np.zeros(rows, np.int32)
        self.kv = np.full((num_pages, page_size), -1, np.int32)
        self._results: deque[StepResult] = deque()
        self._half: tuple[StepPlan, Int32] | None = None  # launched, and to be finished

    def launch(self, plan: StepPlan) -> None:
        if self._half is not None:
            raise RuntimeError(f"step {plan.step}: the step before waits for its masks")
        if (init := plan.init) is not None:
            new = init.sampling
            self.seed[init.slots] = np.where(new["temperature"] > 0, new["seed"], 0)
            self.min_len[init.slots] = new["min_len"]
            if new["stop_ids"].shape[1] != self.stop_ids.shape[1]:
                self.stop_ids = np.full((len(self.seed), new["stop_ids"].shape[1]), -1, np.int32)
            self.stop_ids[init.slots] = new["stop_ids"]
        self.page_table[plan.page_slots, plan.page_indices] = plan.page_ids
        if not np.array_equal(self.length[plan.decode_slots], plan.decode_lens):
            raise RuntimeError(f"step {plan.step}: the host's lengths are not the device's")
        chunks = np.split(plan.prefill_tokens, np.cumsum(plan.prefill_lens)[:-1]) if len(plan.prefill_slots) else []
        for slot in plan.decode_slots:
            self._write(slot, int(self.length[slot]), self.last_token[slot : slot + 1])
        for slot, start, chunk in zip(plan.prefill_slots, plan.prefill_starts, chunks, strict=True):
            self._write(slot, int(start), chunk)
        slots = plan.sampled_slots
        tokens = np.array([self._next(slot) for slot in slots], np.int32)
        if len(plan.constrained_slots):
            self._half = plan, tokens
        else:
            self._complete(plan, tokens)

    def finish(self, masks: Masks) -> None:
        """Move the tokens of constrained rows on to allowed ones."""
        if self._half is None:
            raise RuntimeError("no step waits for masks")
        (plan, tokens), self._half = self._half, None
        assert plan.logits is not None
        allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : self.vocab_size]
        for row, bits in zip(plan.logits.changed[plan.logits.constrained], allowed, strict=True):
            tokens[row] = (tokens[row] + np.argmax(np.roll(bits, -tokens[row]))) % self.vocab_size
        self._complete(plan, tokens)

    def _complete(self, plan: StepPlan, tokens: Int32) -> None:
        self.last_token[plan.sampled_slots] = tokens
        logits = plan.logits
        scores = None if logits is None else made_up(tokens[logits.scored], logits.top)
        prompt = None if logits is None else made_up(logits.prompt_targets, logits.prompt_top)
        self._results.append(StepResult(step=plan.step, tokens=tokens, scores=scores, prompt_scores=prompt))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def close(self) -> None:
        pass

    def _write(self, slot: int, start: int, tokens: np.ndarray) -> None:
        positions = np.arange(start, start + len(tokens))
        pages = self.page_table[slot, positions // self.page_size]
        self.kv[pages, positions % self.page_size] = tokens
        self.length[slot] = start + len(tokens)

    def _next(self, slot: int) -> int:
        """The token after the row's prefix: a hash of what its pages hold, of its seed, and never a masked stop id."""
        length = int(self.length[slot])
        pages = self.page_table[slot, : -(-length // self.page_size)]
        prefix = self.kv[pages].reshape(-1)[:length].astype(np.uint64)
        weights = (np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
        value = int((prefix * weights).sum(dtype=np.uint64)) ^ (int(self.seed[slot]) & (2**64 - 1))
        value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        token = (value >> 33) % self.vocab_size
        while length < self.min_len[slot] and token in self.stop_ids[slot]:
            token = (token + 1) % self.vocab_size
        return token


def made_up(tokens: Int32, top: int) -> Scores[NDArray[Any]]:
    ids = np.tile(np.arange(top, dtype=np.int32), (len(tokens), 1))
    return Scores(-tokens.astype(np.float32), ids, -ids.astype(np.float32))


class StepSeconds(NamedTuple):
    """The host plans (`host`) and launches (`launch`); the device (`device`) begins with the first launch."""

    host: float
    launch: float
    device: float


class TimedExecutor:
    """Takes virtual time for plans, as much as `cost` says.

    `now` is the time on the host, in s. The device runs a step after the other. `collect` waits for the oldest to end,
    as the host of a real device does, so that overlap shows. Tokens are made up from step and row, or are `exact`'s.
    """

    def __init__(
        self, num_pages: int, vocab_size: int, cost: Callable[[StepPlan], StepSeconds],
        exact: SimulatedExecutor | None = None,
    ) -> None:  # fmt: skip
        self.num_pages = num_pages
        self.vocab_size = vocab_size
        self.cost = cost
        self.exact = exact
        self.now = 0.0
        self._free_at = 0.0
        self._launched: deque[tuple[float, float, StepPlan]] = deque()

    def launch(self, plan: StepPlan) -> None:
        seconds = self.cost(plan)
        self.now += seconds.host
        begun = max(self._free_at, self.now)
        self.now += seconds.launch
        self._free_at = max(begun + seconds.device, self.now)
        self._launched.append((begun, self._free_at, plan))
        if self.exact is not None:
            self.exact.launch(plan)

    def finish(self, masks: Masks) -> None:
        if self.exact is None:
            raise RuntimeError("made-up tokens follow no grammar")
        self.exact.finish(masks)

    def collect(self) -> StepResult:
        begun, ended, plan = self._launched.popleft()
        self.now = max(self.now, ended)
        device = (begun, ended) if plan.timed else None
        if self.exact is not None:
            return msgspec.structs.replace(self.exact.collect(), device=device)
        tokens = (plan.sampled_slots + plan.step * SPREAD % self.vocab_size) % self.vocab_size
        return StepResult(step=plan.step, tokens=tokens, device=device)

    def close(self) -> None:
        pass
