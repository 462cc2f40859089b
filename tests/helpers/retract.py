"""An engine run to its end, with retractions on the way."""

from collections.abc import Iterable, Iterator

import numpy as np

from helpers.invariants import check_cache
from minisgl.core.engine import Engine
from minisgl.core.request_state import RequestState, State
from minisgl.core.scheduler import StepDraft
from minisgl.core.types import Request, TokenEvent


def events_of(
    engine: Engine, requests: Iterable[Request], retractions: int = 0, every: int = 5
) -> Iterator[TokenEvent]:
    """Every event, all requests added at once; behind each `every`-th step one is retracted, up to `retractions`."""
    for request in requests:
        engine.add(request)
    while engine.has_work:
        yield from engine.step()
        going = np.isin(engine.table.state, (State.PREFILL, State.DECODE)).any()
        if going and engine.scheduler.counts.retracted < retractions and engine.scheduler.step % every == every - 1:
            engine.scheduler.retract_last()
    check_cache(engine.cache)


def check_promises(engine: Engine) -> None:
    """From here on assert that whom others are retracted for gets a row at once."""
    scheduler, make_room = engine.scheduler, engine.scheduler._make_room

    def checking(step: StepDraft, first: RequestState | None) -> None:
        before = scheduler.counts.retracted
        make_room(step, first)
        assert scheduler.counts.retracted == before or (first is not None and first.slot >= 0)

    scheduler._make_room = checking  # type: ignore[method-assign]
