"""Scheduling policies: in which order waiting requests are admitted. A policy is a class with one method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Protocol

from minisgl.core.request_state import RequestState

CachedLen = Callable[[RequestState], int]  # the prompt tokens of a request that the prefix cache holds now


class Policy(Protocol):
    """Orders the waiting requests. Admission stops at the first that does not fit: no request overtakes it."""

    def order(self, waiting: Sequence[RequestState], cached: CachedLen, step: int) -> Iterable[RequestState]:
        """The candidates for step number `step`, the next to admit first.

        `waiting` is in order of priority and of arrival; a policy decides among equals of priority only.
        """


class FirstComeFirstServed:
    """Order of priority, then of arrival."""

    def order(self, waiting: Sequence[RequestState], cached: CachedLen, step: int) -> Iterable[RequestState]:
        return waiting


class LongestPrefixMatch:
    """Longest cached prefix first, so that a prefix is used while it is still cached (the order of RadixAttention).

    A request that waited `patience` steps goes before all younger ones of its priority, so none of equals starves.
    Only the first `window` requests of the queue are compared, which bounds the cost of a step.
    """

    def __init__(self, patience: int = 64, window: int = 128) -> None:
        self.patience = patience
        self.window = window

    def order(self, waiting: Sequence[RequestState], cached: CachedLen, step: int) -> Iterable[RequestState]:
        def key(request: RequestState) -> tuple[int, bool, int, int]:
            young = step - request.queued_step < self.patience
            return (request.request.priority, young, -cached(request) if young else 0, request.arrival)

        return sorted(islice(waiting, self.window), key=key)


# The values of `--schedule-policy`.
POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {"fcfs": FirstComeFirstServed, "lpm": LongestPrefixMatch}
)
