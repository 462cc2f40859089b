"""What is counted of served requests, at the cost of a few additions a token. `exposition.py` shows it to Prometheus.

Plain numbers without locks: everything happens in the event loop's thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from minisgl.server.records import Exchange, Live

SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
"""Upper bounds in s for the time of a token: a step of a small model on a fast card to one of the CPU's."""
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
"""Upper bounds in s for what a request waits and takes."""
TOKENS = (
    1.0,
    4.0,
    16.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
    32768.0,
    65536.0,
    131072.0,
)
"""Upper bounds for the tokens of a prompt or an answer."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
"""Methods that are counted by name: a client can make up any number of others, and each would be a series for ever."""


class Histogram:
    """Counts of values by upper bound; `counts` has one entry more, for values above the last bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Metrics:
    """Histograms over requests and tokens, and requests by how they ended and by their HTTP status."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(LONG)
        self.inter_token_latency = Histogram(SHORT)
        self.time_per_output_token = Histogram(SHORT)
        self.e2e_request_latency = Histogram(LONG)
        self.queue_time = Histogram(LONG)
        self.prefill_time = Histogram(LONG)
        self.decode_time = Histogram(LONG)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.finished: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "timeout", "error"), 0)
        self.rejected: dict[str, int] = {}
        self.responses: dict[tuple[str, str, int], int] = {}
        self.preparing = 0
        """Requests that are being tokenised."""

    def on_admitted(self, live: Live, now: float) -> None:
        """A request has a row in the engine; only the first time counts."""
        if live.admitted is None:
            live.admitted = now
            self.queue_time.observe(now - live.arrived)

    def on_tokens(self, live: Live, count: int, now: float) -> None:
        """A request has this many tokens more."""
        if live.first is None:
            live.first = now
            self.time_to_first_token.observe(now - live.arrived)
        else:
            self.inter_token_latency.observe((now - live.last) / count, count)
        live.last = now
        live.tokens += count

    def on_end(self, live: Live, finish: str, now: float) -> None:
        """A request is over."""
        live.finish = finish
        self.finished[finish] += 1
        self.e2e_request_latency.observe(now - live.arrived)
        self.prompt_tokens.observe(live.prompt_tokens)
        self.generation_tokens.observe(live.tokens)
        if live.first is not None:
            if live.admitted is not None:
                self.prefill_time.observe(live.first - live.admitted)
            self.decode_time.observe(live.last - live.first)
            if live.tokens > 1:
                self.time_per_output_token.observe((live.last - live.first) / (live.tokens - 1))

    def on_rejected(self, code: str) -> None:
        """A request was turned away: too much is waiting, or what it needs is gone or going down."""
        self.rejected[code] = self.rejected.get(code, 0) + 1

    def on_response(self, exchange: Exchange, route: str) -> None:
        """An HTTP request was answered; `route` is the endpoint's path as it is declared."""
        key = (exchange.method if exchange.method in METHODS else "other", route, exchange.status)
        self.responses[key] = self.responses.get(key, 0) + 1
