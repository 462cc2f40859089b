"""Ctrl-C between steps: a step that an exception tears leaves no engine to go on with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the block ends or calls what it is given; a second one is not held.

    It does nothing in other threads than the main one, where there is no Ctrl-C.
    """
    before = signal.getsignal(signal.SIGINT)
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(frame)
        if len(held) > 1:
            act()

    def act() -> None:
        if held and callable(before):
            frame = held[0]
            held.clear()
            before(signal.SIGINT, frame)

    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield act
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield act
    finally:
        signal.signal(signal.SIGINT, before)
    act()
