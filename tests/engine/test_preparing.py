"""Constraints are made beside the steps: nobody else waits for them, and requests may leave while they are made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from minisgl.core.request_state import Constraint
from minisgl.core.types import Grammar, Request, SamplingParams
from minisgl.engine.preparing import Preparing
from minisgl.errors import InvalidRequestError


class Anything:
    """Allows every token."""

    def fill(self, mask: NDArray[np.int32]) -> None:
        mask.fill(-1)

    def accept(self, token: int) -> bool:
        return True


def request(name: str, source: str = "a") -> tuple[Request, Grammar]:
    grammar = Grammar(kind="regex", source=source)
    return Request.make(id=name, prompt=[1], params=SamplingParams(grammar=grammar)), grammar


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_request_is_ready_when_its_constraint_is_and_not_before() -> None:
    gate, made = threading.Event(), Anything()

    def factory(grammar: Grammar) -> Constraint:
        assert gate.wait(10)
        return made

    preparing = Preparing(factory)
    first, second = request("a"), request("b")
    preparing.start(*first)
    preparing.start(*second)
    assert (preparing.ready(), len(preparing), "a" in preparing) == ([], 2, True)
    gate.set()
    until(lambda: all(future.done() for _, future in preparing._waiting.values()))
    assert preparing.ready() == [(first[0], made), (second[0], made)]
    assert (len(preparing), "a" in preparing, preparing.ready()) == (0, False, [])
    preparing.close()


def test_a_request_that_leaves_is_never_ready() -> None:
    gate = threading.Event()

    def factory(grammar: Grammar) -> Constraint:
        assert gate.wait(10)
        return Anything()

    preparing = Preparing(factory)
    preparing.start(*request("a"))
    preparing.start(*request("b"))
    assert preparing.drop(["b", "a", "unknown"]) == ["b", "a"]
    gate.set()
    preparing.start(*request("c"))
    ready: list[str] = []

    def c_is_ready() -> bool:
        ready.extend(r.id for r, _ in preparing.ready())
        return bool(ready)

    until(c_is_ready)
    assert ready == ["c"]
    preparing.close()


@pytest.mark.parametrize("error", [InvalidRequestError("too much"), RuntimeError("too much")])
def test_what_cannot_be_followed_is_an_error_of_its_own_request(error: Exception) -> None:
    def factory(grammar: Grammar) -> Constraint:
        if grammar.source == "bad":
            raise error
        return Anything()

    preparing = Preparing(factory)
    preparing.start(*request("a", "bad"))
    preparing.start(*request("b"))
    until(lambda: all(future.done() for _, future in preparing._waiting.values()))
    (bad, refusal), (good, constraint) = preparing.ready()
    assert (bad.id, good.id) == ("a", "b")
    assert isinstance(refusal, InvalidRequestError)
    assert "too much" in refusal.message
    assert isinstance(constraint, Anything)
    preparing.close()
