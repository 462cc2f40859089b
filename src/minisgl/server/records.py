"""What is noted of a request while it is served: HTTP's side of it, and the engine's for each of its choices.

Times are seconds on the monotonic clock.
"""

from __future__ import annotations

import dataclasses
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from minisgl.core.types import Request

if TYPE_CHECKING:
    from minisgl.server.submission import Submission


class Live:
    """A request in the engine. `arrived` is when its HTTP request began; times not reached yet are None."""

    __slots__ = (
        "admitted",
        "arrived",
        "cached_tokens",
        "finish",
        "first",
        "id",
        "last",
        "prompt_tokens",
        "submission",
        "tokens",
    )

    def __init__(self, request: Request, submission: Submission, arrived: float) -> None:
        self.id = request.id
        self.prompt_tokens = len(request.prompt)
        self.submission = submission
        self.arrived = arrived
        self.admitted: float | None = None
        self.first: float | None = None
        self.last = arrived
        self.tokens = 0
        self.cached_tokens = 0
        self.finish: str | None = None


@dataclasses.dataclass(slots=True)
class Exchange:
    """An HTTP request and its response; `status` is 0 until the response begins."""

    id: str
    method: str
    path: str
    client: str
    started: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 0
    choices: list[Live] = dataclasses.field(default_factory=list)

    def describe(self, now: float) -> str:
        """The line of the log."""
        parts = [f'{self.client} "{self.method} {self.path}" {self.status} id={self.id}']
        if self.choices:
            prompt, generated, cached = (
                sum(getattr(live, name) for live in self.choices)
                for name in ("prompt_tokens", "tokens", "cached_tokens")
            )
            parts.append(f"prompt={prompt} cached={cached} generated={generated}")
            if times := [live.admitted - live.arrived for live in self.choices if live.admitted is not None]:
                parts.append(f"queue={max(times):.3f}s")
            if times := [live.first - live.arrived for live in self.choices if live.first is not None]:
                parts.append(f"ttft={min(times):.3f}s")
            parts.append("finish=" + ",".join(live.finish or "none" for live in self.choices))
        return " ".join([*parts, f"total={now - self.started:.3f}s"])


EXCHANGE: ContextVar[Exchange | None] = ContextVar("minisgl_exchange", default=None)
"""The exchange that the running task answers; set for each HTTP request by the outermost layer."""
