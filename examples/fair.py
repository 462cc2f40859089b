"""Fair shares: try it with `--policy examples/fair.py:Fair:tokens=16`.

Requests that begin with the same `tokens` tokens, such as one application's system prompt, are of one group. The group
with the fewest tokens in running requests goes next, so that a flood of one does not keep the others waiting (after
Sheng et al., "Fairness in Serving Large Language Models", 2024).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from minisgl.core.policy import Policy, View
from minisgl.core.request_state import RequestState


class Fair(Policy):
    def __init__(self, tokens: int = 16) -> None:
        self.tokens = tokens

    def group(self, request: RequestState) -> bytes:
        return request.tokens[: self.tokens].tobytes()

    def shares(self, view: View) -> Counter[bytes]:
        shares: Counter[bytes] = Counter()
        for request in view.running:
            shares[self.group(request)] += len(request.tokens)
        return shares

    def order(self, requests: Iterable[RequestState], view: View) -> Iterable[RequestState]:
        shares, left = self.shares(view), list(islice(requests, 256))
        while left:
            request = min(left, key=lambda request: (request.slot < 0, shares[self.group(request)], request.arrival))
            shares[self.group(request)] += len(request.tokens)
            left.remove(request)
            yield request

    def retract(self, running: Sequence[RequestState], view: View) -> Iterable[RequestState]:
        shares = self.shares(view)
        return sorted(running, key=lambda request: (shares[self.group(request)], request.arrival), reverse=True)
