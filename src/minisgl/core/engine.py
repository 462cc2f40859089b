"""The engine: takes requests, runs steps, returns events; overlaps the work of host and device."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable

from minisgl.config import Config
from minisgl.core.pages import CacheManager
from minisgl.core.plan import Executor, StepPlan
from minisgl.core.plugins import load_eviction, load_policy
from minisgl.core.request_state import Constraint, ConstraintFactory, RequestState, RequestTable, full_constraint
from minisgl.core.scheduler import STEP_SECONDS, Scheduler
from minisgl.core.types import EngineStats, ModelInfo, Request, TokenEvent
from minisgl.errors import EngineDeadError, InvalidRequestError


class Engine:
    """One model behind one executor. Not thread-safe: one thread adds, aborts and steps.

    With `config.overlap` a step is planned and launched while the one before it runs, and the older one's tokens
    are taken in afterwards (NanoFlow, Zhu et al. 2024): a request that ends on a stop token is found out one
    step late, and what that step computed for it is dropped.

    A mask depends on the token before it. So where rows follow a grammar, the older step's tokens are taken in first,
    and the masks computed while the device runs the newer step's forward pass; then the step is finished with them.
    Masks that would hold the step up are computed beside later steps; their rows sit out until then.
    `constraints` makes a constraint of a grammar; without it grammars are refused. `clock` tells the seconds by which
    policies decide; a simulation gives its own. `admitted` are the ids of the
    requests that the last `step` gave a row, retracted ones once more.
    """

    def __init__(
        self,
        executor: Executor,
        model: ModelInfo,
        config: Config,
        constraints: ConstraintFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert config.max_running_requests is not None
        assert config.max_prefill_length is not None
        rows, max_pages = config.max_running_requests, -(-model.max_seq_len // config.page_size)
        self.executor = executor
        self.model = model
        self.constraints = constraints
        self.overlap = config.overlap
        self.clock = clock
        shared, eviction = config.cache == "radix", load_eviction(config.eviction)
        self.cache = CacheManager(executor.num_pages, config.page_size, shared, rows, max_pages, eviction)
        self.table = RequestTable(rows, model.max_seq_len)
        policy = load_policy(config.schedule_policy)
        self.scheduler = Scheduler(self.table, self.cache, policy, config.max_prefill_length, clock)
        self._launched: deque[StepPlan] = deque()
        self._events: list[TokenEvent] = []
        self.admitted: list[str] = []
        self._arrivals = self._aborted = self._generated_tokens = 0
        self._failed = self._closed = False

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        """Accept a request that `ModelInfo.check` accepts; raises InvalidRequestError for its id or its grammar.

        The `constraint` of its grammar may be given; otherwise it is made here, and no step is launched meanwhile.
        """
        if self._closed or self._failed:
            raise EngineDeadError("the engine was closed" if self._closed else "the engine failed in an earlier step")
        if request.id in self.scheduler.live:
            raise InvalidRequestError(f"a request with id {request.id!r} is running already", param="id")
        params, prompt_len = request.params, len(request.prompt)
        constraint = full_constraint(self.constraints, params, self.model.vocab_size, constraint)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        limit = self.model.max_seq_len if params.max_tokens is None else prompt_len + params.max_tokens
        eos = self.model.eos_token_ids
        self.scheduler.add(RequestState(request, self._arrivals, self.clock(), seed, limit, eos, constraint))
        self._arrivals += 1

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests; each that is live gets its terminal event from the next `step`."""
        for request_id in ids:
            if (event := self.scheduler.abort(request_id)) is not None:
                self._events.append(event)
                self._aborted += 1

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live or self._launched or self._events) and not self._failed

    def step(self) -> list[TokenEvent]:
        """Launch the next step if there is one, and take in a result that is due.

        Raises what the executor raised; the engine cannot go on after that.
        """
        try:
            self._advance()
        except BaseException:
            self._failed = True
            raise
        events, self._events = self._events, []
        self._generated_tokens += sum(len(event.tokens) for event in events)
        return events

    def flush_cache(self) -> int:
        """Drop every cached page that no request uses; how many those were."""
        return self.cache.flush()

    def _advance(self) -> None:
        begun = time.perf_counter()
        self.admitted = []
        plan = self.scheduler.schedule()
        if plan is None:
            if self._launched:
                self._collect()
            self._events += self.scheduler.fill_held(self.model.vocab_size)
            return
        self.executor.launch(plan)
        self._launched.append(plan)
        if plan.init is not None:
            self.admitted = [self.table.request(slot).request.id for slot in plan.init.slots.tolist()]
        if len(self._launched) > 1:
            self._collect()
        # Half of what the step takes without them, within bounds: other rows wait for all masks.
        self.scheduler.mask_budget = min(max((time.perf_counter() - begun) / 2, STEP_SECONDS[0]), STEP_SECONDS[1])
        if len(plan.constrained_slots):
            masks, ended = self.scheduler.masks(plan, self.model.vocab_size)
            self._events += ended
            self.executor.finish(masks)
        self._events += self.scheduler.fill_held(self.model.vocab_size)
        if not self.overlap:
            self._collect()

    def _collect(self) -> None:
        oldest = self._launched.popleft()
        self._events += self.scheduler.commit(oldest, self.executor.collect())

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.live) - len(scheduler.waiting),
            max_running=len(self.table.requests),
            waiting=len(scheduler.waiting),
            waiting_tokens=sum(request.prompt_len for request in scheduler.waiting),
            pages_total=self.executor.num_pages,
            pages_free=self.cache.num_free,
            pages_cached=self.cache.num_cached,
            steps=scheduler.step,
            retracted=scheduler.retracted,
            aborted=self._aborted,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def close(self) -> None:
        """Wait for launched steps and release the device. Nothing is accepted any more."""
        self._closed = True
        self.executor.close()
