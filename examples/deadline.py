"""Earliest deadline first: try it with `--policy examples/deadline.py:Deadline:seconds=2`.

A first token is due `seconds` after the request's arrival and one second later for every `per_second` prompt tokens.
Requests that can no longer be in time go last: they would only make others late (Liu and Layland 1973 for EDF).
"""

from collections.abc import Iterable
from itertools import islice

from minisgl.core.policy import Policy, View
from minisgl.core.request_state import RequestState


class Deadline(Policy):
    def __init__(self, seconds: float = 2.0, per_second: float = 10_000.0, patience: float = 60.0) -> None:
        self.seconds = seconds
        self.per_second = per_second
        self.patience = patience  # s after its deadline at which a late request goes first again

    def key(self, request: RequestState) -> float:
        return request.arrived_at + self.seconds + request.prompt_len / self.per_second

    def order(self, requests: Iterable[RequestState], view: View) -> Iterable[RequestState]:
        def place(request: RequestState) -> tuple[bool, float]:
            deadline = self.key(request)
            late = view.now + view.remaining(request) / self.per_second > deadline
            return late and view.now < deadline + self.patience, deadline

        return sorted(islice(requests, 128), key=place)
