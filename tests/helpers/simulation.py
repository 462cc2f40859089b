"""A simulated device, an engine over it, and what each request must get from it."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from helpers.constraints import Cycle
from helpers.invariants import check_cache
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import Int32, Masks, Scores, StepPlan, StepResult
from minisgl.core.types import ModelInfo, Request, SamplingParams, TokenEvent

VOCAB = 50
EOS = 7


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
        """Execute the plan at once."""
        if self._half is not None:
            raise RuntimeError(f"step {plan.step}: the step before waits for its masks")
        if (init := plan.init) is not None:
            self.seed[init.slots] = np.where(init.temperatures > 0, init.seeds, 0)
            self.min_len[init.slots] = init.min_lens
            if init.stop_ids.shape[1] != self.stop_ids.shape[1]:
                self.stop_ids = np.full((len(self.seed), init.stop_ids.shape[1]), -1, np.int32)
            self.stop_ids[init.slots] = init.stop_ids
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


def made_up(tokens: Int32, top: int) -> Scores:
    ids = np.tile(np.arange(top, dtype=np.int32), (len(tokens), 1))
    return Scores(-tokens.astype(np.float32), ids, -ids.astype(np.float32))


def model_info(max_seq_len: int) -> ModelInfo:
    return ModelInfo(name="simulated", vocab_size=VOCAB, max_seq_len=max_seq_len, eos_token_ids=(EOS,))


def simulated_engine(*, num_pages: int = 64, max_seq_len: int = 128, page_size: int = 4, **settings: object) -> Engine:
    """An engine whose device is simulated; settings are fields of Config."""
    defaults: dict[str, object] = {"max_running_requests": 8, "max_prefill_length": 16}
    config = Config(page_size=page_size, **{**defaults, **settings})  # type: ignore[arg-type]
    assert config.max_running_requests is not None
    rows = config.max_running_requests
    length = min(max_seq_len, num_pages * page_size)
    executor = SimulatedExecutor(num_pages, page_size, rows, length, VOCAB)
    return Engine(executor, model_info(length), config, lambda grammar: Cycle(grammar, VOCAB, EOS))


def expected_tokens(request: Request, max_seq_len: int) -> list[int]:
    """The request's tokens on a simulated device of its own: one page a token, no plans, no cache, no batch mates."""
    params, prompt = request.params, request.prompt
    limit = max_seq_len if params.max_tokens is None else min(max_seq_len, len(prompt) + params.max_tokens)
    device = SimulatedExecutor(limit, 1, 1, limit, VOCAB)
    device.page_table[0] = np.arange(limit)
    device.seed[0] = (params.seed or 0) if params.temperature > 0 else 0
    stops = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    constraint = None if params.grammar is None else Cycle(params.grammar, VOCAB, EOS)
    out: list[int] = []
    device._write(0, 0, np.array(prompt, np.int32))
    while True:
        allowed = set(range(VOCAB) if constraint is None else constraint.allowed())
        allowed -= set(stops if len(out) < params.min_tokens else [])
        if not allowed:
            return out
        token = device._next(0)
        out.append(min(allowed, key=lambda t: (t - token) % VOCAB))
        if constraint is not None:
            constraint.said += 1
        stopped = out[-1] in stops and len(out) > params.min_tokens
        if stopped or len(prompt) + len(out) >= limit:
            return out
        device._write(0, len(prompt) + len(out) - 1, np.array(out[-1:], np.int32))


def advance(engine: Engine, steps: int = 10_000) -> list[TokenEvent]:
    """The events of so many steps, or of all until nothing is left; the cache is checked after each."""
    events: list[TokenEvent] = []
    for _ in range(steps):
        if not engine.has_work:
            return events
        events += engine.step()
        check_cache(engine.cache)
    assert steps < 10_000, f"still busy: {engine.stats()}"
    return events


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.add(request)
    events = advance(engine)
    return {request.id: [event for event in events if event.id == request.id] for request in requests}


def check_answers(engine: Engine, requests: Sequence[Request], events: dict[str, list[TokenEvent]]) -> None:
    """Assert that each request got its tokens and then one terminal event, and that the engine holds nothing."""
    for request in requests:
        mine = events[request.id]
        assert tokens_of(mine) == expected_tokens(request, engine.model.max_seq_len)
        assert [event.finish is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    assert engine.cache.num_owned == 0
    assert engine.stats().running == engine.stats().waiting == 0


def record_plans(engine: Engine) -> list[StepPlan]:
    """What the engine launches from here on, in a list that grows."""
    plans: list[StepPlan] = []
    launch = engine.executor.launch

    def record(plan: StepPlan) -> None:
        plans.append(plan)
        launch(plan)

    engine.executor.launch = record  # type: ignore[method-assign]
    return plans


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def request(name: str, prompt: Sequence[int], priority: int = 0, **params: object) -> Request:
    """A request with sampling parameters by name; greedy unless said otherwise."""
    return Request.make(name, list(prompt), SamplingParams(**{"temperature": 0.0, **params}), priority)  # type: ignore[arg-type]
