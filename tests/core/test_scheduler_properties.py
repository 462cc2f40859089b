"""Random arrivals, lengths, aborts and settings against the scheduler; DESIGN's invariants after every step.

Faults planted once that this file or test_scheduler.py notices: a token of the request that had a row before; a
retracted request that is not queued again, forgets its tokens, or is the oldest; tokens after the terminal event; pages
published before they are computed, chunks that cost no budget; requests that end a token late, at a token that is no
stop, or past their limit; aborted ones that stay queued; rows released as if all known tokens were computed; one
admitted row of several told to the device; prompts that are to be scored starting on cached pages; stop tokens allowed
before `min_tokens`.
"""

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.constraints import cycle
from helpers.invariants import check_cache
from helpers.simulation import VOCAB, expected_tokens, request, simulated_engine, tokens_of
from minisgl.core.engine import Engine
from minisgl.core.policy import POLICIES
from minisgl.core.radix_cache import EVICTIONS
from minisgl.core.request_state import State
from minisgl.core.types import FinishReason, Request, TokenEvent

MAX_SEQ_LEN = 40


class SchedulerMachine(RuleBasedStateMachine):
    """A user who adds, aborts and waits; the device is simulated, so every token is checked."""

    engine: Engine

    @initialize(
        page_size=st.sampled_from([1, 2, 5, 8]),
        spare=st.integers(0, 60),
        cache=st.sampled_from(["radix", "radix", "naive"]),
        overlap=st.booleans(),
        max_running_requests=st.integers(1, 5),
        max_prefill_length=st.integers(1, 30),
        schedule_policy=st.sampled_from(list(POLICIES)),
        eviction=st.sampled_from(list(EVICTIONS)),
    )
    def start(self, page_size: int, spare: int, **settings: object) -> None:
        pages = -(-(MAX_SEQ_LEN + spare) // page_size)
        self.engine = simulated_engine(page_size=page_size, num_pages=pages, max_seq_len=MAX_SEQ_LEN, **settings)
        self.engine.scheduler.policy.strict = True
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.aborted: set[str] = set()

    @rule(
        shared=st.integers(0, 12),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
        max_tokens=st.none() | st.integers(1, 8),
        ignore_eos=st.booleans(),
        seed=st.integers(-5, 5),
        temperature=st.sampled_from([0.0, 0.8]),
        priority=st.integers(-1, 1),
        logprobs=st.none() | st.integers(0, 3),
        prompt_logprobs=st.none() | st.integers(0, 3),
        grammar=st.none() | st.builds(cycle, st.integers(1, VOCAB), st.integers(0, 8), st.sampled_from([0, 3, 9])),
        min_tokens=st.integers(0, 1),
    )
    def add(self, shared: int, own: list[int], priority: int, **params: object) -> None:
        name = str(len(self.requests))
        self.requests[name] = request(name, [*range(shared), *own], priority, **params)
        self.engine.add(self.requests[name])
        self.events[name] = []

    @precondition(lambda self: bool(self.requests))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if name in self.engine.scheduler.live:
            self.aborted.add(name)
        self.engine.abort([name])

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for event in self.engine.step():
                self.take(event)

    @rule()
    def flush(self) -> None:
        self.engine.cache.flush()

    def take(self, event: TokenEvent) -> None:
        mine = self.events[event.id]
        assert not mine or mine[-1].finish is None, "an event after the terminal one"
        mine.append(event)
        wanted = self.requests[event.id]
        if wanted.params.logprobs is not None:
            assert [score.logprob for score in event.logprobs] == [-token for token in event.tokens]
            assert {score.top_ids for score in event.logprobs} <= {tuple(range(wanted.params.logprobs))}
        else:
            assert not event.logprobs
        first = event.tokens and not any(other.tokens for other in mine[:-1])
        if first and wanted.params.prompt_logprobs is not None:
            scored = [None if score is None else -score.logprob for score in event.prompt_logprobs]
            assert scored == [None, *wanted.prompt[1:]]
        else:
            assert not event.prompt_logprobs

    @invariant()
    def pages_are_in_one_place(self) -> None:
        check_cache(self.engine.cache)

    @invariant()
    def the_queue_is_sorted(self) -> None:
        keys = [request.sort_key for request in self.engine.scheduler.waiting]
        assert keys == sorted(keys)

    @invariant()
    def rows_keep_their_order(self) -> None:
        table = self.engine.table
        used = table.state != State.FREE
        going = (table.state == State.PREFILL) | (table.state == State.DECODE) | (table.state == State.HELD)
        assert (table.num_computed_tokens[used] <= table.num_tokens[used] + 1).all()
        assert (table.num_tokens[used] <= table.max_tokens[used]).all()
        held = self.engine.cache.row_pages[: len(table.state)]
        assert (held[~used] == 0).all()
        needed = -(-table.num_computed_tokens // self.engine.cache.page_size)
        again = table.num_computed_tokens + 1 == table.prefill_len  # its last token may have to be computed again
        assert (held - needed >= 0)[going].all()
        assert (held - needed <= (table.constrained & again))[going].all()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_work:
                break
            for event in self.engine.step():
                self.take(event)
        assert not self.engine.has_work, f"still busy: {self.engine.stats()}"
        for name, wanted in self.requests.items():
            expected = expected_tokens(wanted, MAX_SEQ_LEN)
            got = tokens_of(self.events[name])
            assert self.events[name][-1].finish not in (None, FinishReason.ERROR)
            if self.events[name][-1].finish is FinishReason.ABORT:
                assert name in self.aborted
                assert got == expected[: len(got)]
            else:
                assert got == expected
        cache = self.engine.cache
        check_cache(cache)
        assert cache.num_owned == 0
        cache.flush()
        assert cache.num_free == self.engine.executor.num_pages


TestScheduler = SchedulerMachine.TestCase
# A failure is reported as it was found: to shrink it takes minutes, so add Phase.shrink only to look into one.
TestScheduler.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, derandomize=True, phases=[Phase.generate]
)
