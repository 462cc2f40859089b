"""How many requests a server keeps, and the queue that the limits bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from minisgl.config import Config
from minisgl.core.types import Request
from minisgl.errors import InvalidRequestError
from minisgl.server.board import Board, Held
from minisgl.server.errors import OverloadedError, QueueFullError

MAX_LIVE_REQUESTS = 4096
"""Requests that wait or run at a time; more are turned away rather than queued without bound."""
MAX_RETRY_SECONDS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """`live` requests at most; the rest is what `Config` says under the same names, None for no limit."""

    live: int = MAX_LIVE_REQUESTS
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    request_timeout: float | None = None

    @classmethod
    def of(cls, config: Config) -> Limits:
        """The limits that a configuration asks for."""
        return cls(
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            request_timeout=config.request_timeout,
        )


class Queue:
    """Requests in the engine that have no token yet, and the tokens of their prompts; `live` are all that live.

    `wait` is a running mean of the time to the first token, in s: what a client that is turned away is told to wait.
    With a `board` and a row of it, the limits hold for what all processes of the server have together.
    """

    def __init__(self, limits: Limits, board: Board | None = None, row: int = 0) -> None:
        self.limits = limits
        self.requests = 0
        self.tokens = 0
        self.live = 0
        self.wait = 0.0
        self._board = board
        self._row = row

    @property
    def whole(self) -> Held:
        """What the whole server holds."""
        others = self._board.held(without=self._row) if self._board is not None else Held()
        return Held(self.requests + others.requests, self.tokens + others.tokens, self.live + others.live)

    def check(self, requests: Sequence[Request]) -> None:
        """Raise InvalidRequestError, OverloadedError or QueueFullError unless these may enter beside those that live.

        An empty queue takes whatever the server can keep: otherwise the request could never be served.
        """
        limits, held = self.limits, self.whole
        if len(requests) > limits.live:
            raise InvalidRequestError(f"at most {limits.live} prompts fit in one request", param="prompt")
        if held.live + len(requests) > limits.live:
            raise OverloadedError(f"{held.live} requests are live already; try again later", self.retry_after)
        if not held.requests:
            return
        if limits.max_queued_requests is not None and held.requests + len(requests) > limits.max_queued_requests:
            raise QueueFullError(f"{held.requests} requests are waiting already; try again later", self.retry_after)
        if limits.max_queued_tokens is not None:
            tokens = sum(len(request.prompt) for request in requests)
            if held.tokens + tokens > limits.max_queued_tokens:
                raise QueueFullError(
                    f"prompts of {held.tokens} tokens are waiting already; try again later", self.retry_after
                )

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room."""
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(self.wait)))

    def enter(self, tokens: int) -> None:
        """A request with so many prompt tokens lives, and waits."""
        self.requests += 1
        self.tokens += tokens
        self.live += 1
        self._post()

    def leave(self, tokens: int, waited: float | None = None) -> None:
        """It waits no more: it has its first token after `waited` s, or has ended without one."""
        self.requests -= 1
        self.tokens -= tokens
        if waited is not None:
            self.wait += (waited - self.wait) / 8
        self._post()

    def end(self) -> None:
        """A request has ended."""
        self.live -= 1
        self._post()

    def _post(self) -> None:
        if self._board is not None:
            self._board.post(self._row, Held(self.requests, self.tokens, self.live))
