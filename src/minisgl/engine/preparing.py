"""Requests on their way into the engine: those with a grammar wait here while a thread makes their constraint."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from minisgl.core.request_state import Constraint, ConstraintFactory, make_constraint
from minisgl.core.types import Grammar, Request
from minisgl.errors import InvalidRequestError


class Preparing:
    """Makes constraints beside the steps, in the order of the requests. Belongs to the thread that steps."""

    def __init__(self, factory: ConstraintFactory | None) -> None:
        self._factory = factory
        self._thread = ThreadPoolExecutor(1, "minisgl-constraint")
        self._waiting: dict[str, tuple[Request, Future[Constraint]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting

    def start(self, request: Request, grammar: Grammar) -> None:
        """Begin to make the constraint of this request's grammar."""
        self._waiting[request.id] = (request, self._thread.submit(make_constraint, self._factory, grammar))

    def drop(self, ids: Iterable[str]) -> list[str]:
        """Forget these requests; those of them that were waiting here."""
        dropped = [request_id for request_id in ids if request_id in self._waiting]
        for request_id in dropped:
            self._waiting.pop(request_id)[1].cancel()
        return dropped

    def ready(self) -> list[tuple[Request, Constraint | InvalidRequestError]]:
        """The requests whose constraint has been made, or refused, since the last look."""
        done = [(request, made) for request, made in self._waiting.values() if made.done()]
        out: list[tuple[Request, Constraint | InvalidRequestError]] = []
        for request, made in done:
            del self._waiting[request.id]
            error = made.exception()
            if error is None:
                out.append((request, made.result()))
            elif isinstance(error, InvalidRequestError):
                out.append((request, error))
            else:
                raise error
        return out

    def close(self) -> None:
        """Let the thread end; what it is at is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)
