"""The engine: takes requests, runs steps, returns events; overlaps the work of host and device."""

import math
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from minisgl.config import Config
from minisgl.core.pages import CacheManager
from minisgl.core.plan import Executor, StepPlan
from minisgl.core.policy import POLICIES, Policy
from minisgl.core.radix_cache import EVICTIONS, EvictionPolicy
from minisgl.core.request_state import Constraint, ConstraintFactory, RequestState, RequestTable, make_constraint
from minisgl.core.scheduler import STEP_SECONDS, Scheduler
from minisgl.core.types import ChunkRecord, EngineStats, ModelInfo, Request, StepRecord, TokenEvent
from minisgl.errors import EngineDeadError, InvalidRequestError

FIRST_SLACK: Final = 5e-4  # s by which a step is in the stream before the one before it ends, at first
LEAST_SLACK, MOST_SLACK = 2e-4, 5e-3
WAITED: Final = 2e-5  # s: a result that took less to come was there already
ROWS, TOKENS = 16, 64  # steps that differ by less take about the same time
FIRST_LAUNCH: Final = 1e-3  # s until the device has work of a step; it computes that while the rest is launched
TRIALS: Final = 3  # steps of a shape that are seen before it is predicted: kernels compile in the first
OUTLIER: Final = 1.5  # a step that took so many times the mean counts as if it had taken this


class Observer:
    """Sees what an engine does, from when it is in `Engine.observers` on: requests that it accepts, the events of each
    `step`, and each step once its result is taken in. A subclass says what is done about it.
    """

    def add(self, request: Request) -> None: ...

    def take(self, events: Sequence[TokenEvent]) -> None: ...

    def observe(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


@dataclass
class Estimate:
    mean: float = math.inf  # s that steps of a shape take
    spread: float = 0.0  # mean distance from the mean
    count: int = 0

    def take(self, seconds: float, waited: bool) -> None:
        """`waited`: the step took that long; otherwise it ended at some time before."""
        self.count += 1
        if self.count <= TRIALS:
            self.mean = min(self.mean, seconds)
        elif waited:
            off = min(seconds, OUTLIER * self.mean) - self.mean
            self.mean += off / 8
            self.spread += (abs(off) - self.spread) / 8
        else:
            self.mean = 0.9 * min(self.mean, seconds)


class LaunchTimer:
    """Predicts when the running step ends, from running means of earlier ones of its shape.

    A step is to be launched when that time is as far off as planning and launching take, and some slack. The slack
    grows when a step came too late, so that the device was idle, and shrinks slowly.
    """

    def __init__(self) -> None:
        self._estimates: defaultdict[tuple[int, int], Estimate] = defaultdict(Estimate)  # by shape
        self._host = 0.0  # s until a step has work for the device, the most of late
        self._slack = FIRST_SLACK
        self._launched: deque[tuple[Estimate, float]] = deque()  # with when the device may have begun; the oldest runs

    def launched(self, plan: StepPlan, planned: float, launched: float, sent: float) -> None:
        """The host planned a step from `planned` on, and launched it from `launched` until `sent`."""
        tokens, rows = len(plan.prefill_tokens), len(plan.decode_slots)
        estimate = self._estimates[-(-rows // ROWS), -(-tokens // TOKENS)]
        host_bound = 2 * (sent - launched) > estimate.mean
        ready = sent if host_bound else min(sent, launched + FIRST_LAUNCH)
        self._launched.append((estimate, ready))
        self._host = max(ready - planned, self._host + (ready - planned - self._host) / 16)

    def collected(self, awaited: float, arrived: float) -> None:
        """The host waited from `awaited` to `arrived` for the result of the oldest step."""
        estimate, began = self._launched.popleft()
        waited = arrived - awaited > WAITED
        estimate.take(arrived - began, waited)
        if self._launched:
            following, ready = self._launched[0]
            self._launched[0] = following, max(ready, arrived)
            late = (arrived if waited else awaited) - ready < LEAST_SLACK / 2
            self._slack = min(1.5 * self._slack, MOST_SLACK) if late else max(0.99 * self._slack, LEAST_SLACK)

    def wait(self, now: float) -> float:
        """Seconds from `now` to the next launch; 0 where there is nothing to wait for or nothing known."""
        if len(self._launched) != 1:
            return 0.0
        estimate, began = self._launched[0]
        if estimate.count < TRIALS:
            return 0.0
        end = began + estimate.mean - 2 * estimate.spread
        return max(0.0, end - self._host - self._slack - now)


class Engine:
    """One model behind one executor. Not thread-safe: one thread adds, aborts and steps.

    With `config.overlap` a step is planned and launched while the one before it runs, and the older one's tokens
    are taken in afterwards (NanoFlow, Zhu et al. 2024): a request that ends on a stop token is found out one
    step late, and what that step computed for it is dropped. Who can use the time waits for `seconds_to_launch` before
    a step, and adds requests meanwhile: with `config.launch_ahead` just-in-time they are in the next step.

    A mask depends on the token before it. So where rows follow a grammar, the older step's tokens are taken in first,
    and the masks computed while the device runs the newer step's forward pass; then the step is finished with them.
    Masks that would hold the step up are computed beside later steps; their rows sit out until then.
    `constraints` makes a constraint of a grammar; without it grammars are refused. `clock` tells the seconds by which
    policies decide; a simulation gives its own. Without `policies` they are those of the package that `config` names.
    """

    def __init__(
        self, executor: Executor, model: ModelInfo, config: Config, constraints: ConstraintFactory | None = None,
        clock: Callable[[], float] = time.monotonic, policies: tuple[Policy, EvictionPolicy] | None = None,
    ) -> None:  # fmt: skip
        assert config.max_running_requests is not None
        assert config.max_prefill_length is not None
        rows, max_pages = config.max_running_requests, -(-model.max_seq_len // config.page_size)
        self.executor = executor
        self.model = model
        self.constraints = constraints
        self.overlap = config.overlap
        just_in_time = config.overlap and config.launch_ahead == "just-in-time"
        self._timer = LaunchTimer() if just_in_time else None
        self.clock = clock
        policy, eviction = policies or (POLICIES[config.schedule_policy](), EVICTIONS[config.eviction]())
        shared = config.cache == "radix"
        self.cache = CacheManager(executor.num_pages, config.page_size, shared, rows, max_pages, eviction)
        self.table = RequestTable(rows, model.max_seq_len)
        self.scheduler = Scheduler(self.table, self.cache, policy, config.max_prefill_length, model.vocab_size)
        self._launched: deque[tuple[StepPlan, StepRecord | None]] = deque()
        self.observers: list[Observer] = []
        self._arrivals = 0
        self._dead = ""  # why nothing is accepted any more

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        """Accept a request that `ModelInfo.check` accepts; raises InvalidRequestError for its id or its grammar.

        The `constraint` of its grammar may be given; otherwise it is made here, and no step is launched meanwhile.
        """
        if self._dead:
            raise EngineDeadError(self._dead)
        if request.id in self.scheduler.live:
            raise InvalidRequestError(f"a request with id {request.id!r} is running already", param="id")
        params, prompt_len = request.params, len(request.prompt)
        if params.grammar is not None and constraint is None:
            constraint = make_constraint(self.constraints, params.grammar)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        limit = self.model.max_seq_len if params.max_tokens is None else prompt_len + params.max_tokens
        stop_ids = tuple({*params.stop_token_ids, *(() if params.ignore_eos else self.model.eos_token_ids)})
        self.scheduler.add(RequestState(request, self._arrivals, self.clock(), seed, limit, stop_ids, constraint))
        self._arrivals += 1
        for observer in self.observers:
            observer.add(request)

    @property
    def admitted(self) -> list[str]:
        """Ids of the requests that the last `step` gave a row, retracted ones once more."""
        return [name for name, _ in self.scheduler.admitted]

    def abort(self, ids: Iterable[str]) -> None:
        """End these requests; each that is live gets its terminal event from the next `step`."""
        for request_id in ids:
            self.scheduler.abort(request_id)

    def seconds_to_launch(self) -> float:
        """How long the next `step` can wait without leaving the device idle."""
        return 0.0 if self._timer is None or self.scheduler.events else self._timer.wait(self.clock())

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.live or self._launched or self.scheduler.events) and not self._dead

    def step(self) -> list[TokenEvent]:
        """Launch the next step if there is one, and take in a result that is due.

        Raises what the executor raised; the engine cannot go on after that, nor when it was closed: EngineDeadError.
        """
        if self._dead:
            raise EngineDeadError(self._dead)
        try:
            self._advance()
        except BaseException:
            self._dead = "the engine failed in an earlier step"
            raise
        events, self.scheduler.events = self.scheduler.events, []
        for observer in self.observers:
            observer.take(events)
        return events

    def _advance(self) -> None:
        begun = time.perf_counter()
        self.cache.now = planned = self.clock()
        plan = self.scheduler.schedule()
        launched = self.clock()
        if plan is None:
            if self._launched:
                self._collect()
            elif not self.observers:
                self.scheduler.ended = []  # which only the record of a step would tell
            self.scheduler.fill_held()
            return
        if self.observers:
            plan = msgspec.structs.replace(plan, timed=True)
        self.executor.launch(plan)
        if self._timer is not None:
            self._timer.launched(plan, planned, launched, self.clock())
        record = self._record(plan, planned, launched) if self.observers else None
        self._launched.append((plan, record))
        self.scheduler.retracted_ids = []
        if len(self._launched) > 1:
            self._collect()
        # Half of what the step takes without them, within bounds: other rows wait for all masks.
        self.scheduler.mask_budget = min(max((time.perf_counter() - begun) / 2, STEP_SECONDS[0]), STEP_SECONDS[1])
        if len(plan.constrained_slots):
            self.executor.finish(self.scheduler.masks(plan))
        self.scheduler.fill_held()
        if not self.overlap:
            self._collect()

    def _collect(self) -> None:
        plan, record = self._launched.popleft()
        awaited = self.clock()
        result = self.executor.collect()
        arrived = self.clock()
        if self._timer is not None:
            self._timer.collected(awaited, arrived)
        self.scheduler.commit(plan, result)
        if record is not None:
            record.awaited, record.arrived, record.committed = awaited, arrived, self.clock()
            record.device, record.ended = result.device, self.scheduler.ended
            for observer in self.observers:
                observer.observe(record)
        self.scheduler.ended = []

    def _record(self, plan: StepPlan, planned: float, launched: float) -> StepRecord:
        ids = ["" if request is None else request.request.id for request in self.table.requests]
        columns = (plan.prefill_slots, plan.prefill_starts, plan.prefill_lens, plan.prefill_final)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return StepRecord(
            step=plan.step,
            planned=planned,
            launched=launched,
            sent=self.clock(),
            decodes=[ids[slot] for slot in plan.decode_slots.tolist()],
            chunks=[ChunkRecord(ids[slot], *rest) for slot, *rest in rows],
            admitted=self.scheduler.admitted,
            retracted=self.scheduler.retracted_ids,
            running=self.scheduler.num_running,
            waiting=len(self.scheduler.waiting),
            pages_free=self.cache.num_free,
            pages_cached=self.cache.num_cached,
        )

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return msgspec.structs.replace(
            scheduler.counts,
            running=scheduler.num_running,
            max_running=len(self.table.requests),
            waiting=len(scheduler.waiting),
            waiting_tokens=sum(request.prompt_len for request in scheduler.waiting),
            pages_total=self.executor.num_pages,
            pages_free=self.cache.num_free,
            pages_cached=self.cache.num_cached,
            pages_evictable=self.cache.available - self.cache.num_free,
            steps=scheduler.step,
        )

    def close(self) -> None:
        """Wait for launched steps and release the device. Nothing is accepted any more."""
        self._dead = "the engine was closed"
        for observer in self.observers:
            observer.close()
        self.executor.close()
