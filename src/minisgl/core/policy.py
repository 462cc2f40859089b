"""Scheduling policies: in which order prompts are computed, and which running request is retracted for another."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from minisgl.core.pages import CacheManager
from minisgl.core.request_state import RequestState, RequestTable, State

logger = logging.getLogger(__name__)

WINDOW = 128  # requests that are compared with each other in one step, which bounds its cost


class View:
    """What a policy sees beside the requests: the time, in seconds, and what is computed already."""

    def __init__(self, table: RequestTable, cache: CacheManager) -> None:
        self._table, self._cache = table, cache

    @property
    def now(self) -> float:
        return self._cache.now

    @property
    def running(self) -> list[RequestState]:
        """The requests that have a row, in no order."""
        return [request for request in self._table.requests if request is not None]

    def prefilling(self, request: RequestState) -> bool:
        return bool(self._table.state[request.slot] == State.PREFILL)

    def computed(self, request: RequestState) -> int:
        """How many of `request.tokens` need not be computed: they are, or the prefix cache holds them now."""
        if request.slot >= 0:
            return int(self._table.num_computed_tokens[request.slot])
        return request.cached_prefix(self._cache).end * self._cache.page_size

    def remaining(self, request: RequestState) -> int:
        return len(request.tokens) - self.computed(request)


class Policy:
    """First come, first served among equals of `priority`; the base of every policy, which overrides what it changes.

    A policy must be quick, it runs in every step, and it must not change a request. When it raises, or names a request
    that it was not given, the error is logged and first come, first served takes its place.
    """

    def key(self, request: RequestState) -> float | tuple[float, ...]:
        """Its place in the queue, the lowest first; of equals the oldest is first. It is asked once, on arrival."""
        return request.priority

    def order(self, requests: Iterable[RequestState], view: View) -> Iterable[RequestState]:
        """Whose prompts go on in this step, the first first: waiting requests and running ones that are not through.

        `requests` is in the order of the keys and may be long; not all need to be returned. Waiting ones are admitted
        up to the first that does not fit: none overtakes it.
        """
        return requests

    def retract(self, running: Sequence[RequestState], view: View) -> Iterable[RequestState]:
        """Who gives back its row and pages when pages run out, the first first. `running` is in no order."""
        return sorted(running, key=lambda request: request.sort_key, reverse=True)

    def make_room(self, waiting: RequestState, running: Sequence[RequestState], view: View) -> Iterable[RequestState]:
        """Who may be retracted so that `waiting`, the next to be admitted, fits; the first first, all others stay.

        It happens only if it makes room. No two requests may be allowed to retract each other.
        """
        return self.retract([other for other in running if other.priority > waiting.priority], view)


class LongestPrefixMatch(Policy):
    """Prompts whose prefix is cached first, so that it is used while it is cached (RadixAttention).

    The part that is cached counts as waiting: all of a prompt as `patience` seconds, a half as half of them.
    """

    def __init__(self, patience: float = 60.0) -> None:
        self.patience = patience

    def order(self, requests: Iterable[RequestState], view: View) -> Iterable[RequestState]:
        def place(request: RequestState) -> tuple[int, float, int]:
            cached = view.computed(request) / len(request.tokens)
            return request.priority, request.arrived_at - self.patience * cached, request.arrival

        return sorted(islice(requests, WINDOW), key=place)


class ShortestRemainingPrompt(Policy):
    """The prompt with the fewest tokens left to compute first. A second of waiting counts as `aging` tokens less."""

    def __init__(self, aging: float = 1000.0) -> None:
        self.aging = aging

    def key(self, request: RequestState) -> float | tuple[float, ...]:
        return request.priority, request.prompt_len + self.aging * request.arrived_at

    def order(self, requests: Iterable[RequestState], view: View) -> Iterable[RequestState]:
        def place(request: RequestState) -> tuple[int, float]:
            return request.priority, view.remaining(request) + self.aging * request.arrived_at

        return sorted(islice(requests, WINDOW), key=place)


class PriorityWithAging(Policy):
    """The lowest number first; each `aging` seconds of waiting make up for one. With `aging` 0 nothing does."""

    def __init__(self, aging: float = 60.0) -> None:
        self.aging = aging

    def key(self, request: RequestState) -> float | tuple[float, ...]:
        return request.priority + request.arrived_at / self.aging if self.aging else request.priority

    def make_room(self, waiting: RequestState, running: Sequence[RequestState], view: View) -> Iterable[RequestState]:
        return (other for other in super().make_room(waiting, running, view) if other.sort_key > waiting.sort_key)


# The values of `--schedule-policy`.
POLICIES: Mapping[str, Callable[..., Policy]] = MappingProxyType(
    {"fcfs": Policy, "lpm": LongestPrefixMatch, "srpf": ShortestRemainingPrompt, "priority": PriorityWithAging}
)


class PolicyGuard:
    """A policy as the scheduler asks it: what it answers is checked, and when it fails, fcfs takes its place."""

    def __init__(
        self, policy: Policy, view: View, live: Mapping[str, RequestState], waiting: list[RequestState]
    ) -> None:
        self.policy, self.view, self.live, self.waiting = policy, view, live, waiting
        self.strict = False  # a failure is raised instead

    def place(self, request: RequestState) -> None:
        """Give the request its sort key. Raises nothing."""
        try:
            key = self.policy.key(request)
            numbers = key if isinstance(key, tuple) else (key,)
            if not all(isinstance(number, (int, float)) and number == number for number in numbers):
                raise ValueError(f"its key {key!r} is neither a number nor a tuple of numbers")
            request.sort_key = numbers, request.arrival
        except (Exception, SystemExit):
            self._replace()

    def order(self, requests: Callable[[], Iterable[RequestState]], most: int) -> list[RequestState]:
        def allowed(request: RequestState) -> bool:
            known = self.live.get(request.request.id) is request
            return known and (request.slot < 0 or self.view.prefilling(request))

        return self._ask(lambda policy: policy.order(requests(), self.view), allowed, most)

    def retract(self, running: Sequence[RequestState]) -> list[RequestState]:
        return self._ask(lambda policy: policy.retract(running, self.view), set(running).__contains__, len(running))

    def make_room(self, waiting: RequestState, running: Sequence[RequestState]) -> list[RequestState]:
        known = set(running)
        return self._ask(lambda policy: policy.make_room(waiting, running, self.view), known.__contains__, len(known))

    def _ask(
        self, question: Callable[[Policy], Iterable[RequestState]], allowed: Callable[[RequestState], bool], most: int
    ) -> list[RequestState]:
        """The first so many requests that the policy names; it fails by a wrong one and by one that is named twice."""
        named: dict[RequestState, None] = {}
        try:
            for request in islice(question(self.policy), most):
                is_one = isinstance(request, RequestState)
                if not is_one or request in named or not allowed(request):
                    what = f"request {request.request.id!r}" if is_one else repr(request)[:80]
                    raise ValueError(f"it returned {what}, which it was not given, or twice")
                named[request] = None
        except (Exception, SystemExit):
            self._replace()
            return self._ask(question, allowed, most)
        return list(named)

    def _replace(self) -> None:
        """Go on without a policy that failed: called where its exception is handled."""
        if self.strict or type(self.policy) is Policy:
            raise
        logger.exception("the scheduling policy %s failed; fcfs takes its place", type(self.policy).__name__)
        self.policy = Policy()
        for request in self.live.values():
            self.place(request)
        self.waiting.sort(key=lambda request: request.sort_key)
