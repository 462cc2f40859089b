"""Shortest remaining processing time: try it with `--policy examples/srpt.py:Shortest:aging=500`.

The request that is soonest done goes first (Schrage 1968). Its output counts too, as far as `max_tokens` tells it. A
second of waiting counts as `aging` tokens less, so that long requests are served in the end.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from minisgl.core.policy import Policy, View
from minisgl.core.request_state import RequestState


class Shortest(Policy):
    def __init__(self, aging: float = 500.0, output_weight: float = 8.0) -> None:
        self.aging = aging
        self.output_weight = output_weight  # a decoded token costs as much as so many prompt tokens

    def work(self, request: RequestState, computed: int) -> float:
        outputs = request.max_tokens - len(request.tokens)
        return len(request.tokens) - computed + self.output_weight * min(outputs, 1024)

    def key(self, request: RequestState) -> float:
        return self.work(request, 0) + self.aging * request.arrived_at

    def order(self, requests: Iterable[RequestState], view: View) -> Iterable[RequestState]:
        def remaining(request: RequestState) -> float:
            return self.work(request, view.computed(request)) + self.aging * request.arrived_at

        return sorted(islice(requests, 64), key=remaining)

    def retract(self, running: Sequence[RequestState], view: View) -> Iterable[RequestState]:
        return sorted(running, key=lambda request: self.work(request, view.computed(request)), reverse=True)
