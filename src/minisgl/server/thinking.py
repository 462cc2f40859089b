"""Splitting an answer into what the model thought and what it said, while it is coming."""

from __future__ import annotations

from collections.abc import Callable

from minisgl.core.types import CLOSE_THOUGHT, OPEN_THOUGHT
from minisgl.server.parts import Content, Part, Reasoning, merged, partial_end


class ThinkSplitter:
    """`<think>…</think>` at the beginning of an answer is reasoning, what follows is content.

    `opened` says that the prompt has opened the block. Blanks around the tags are dropped. However the text is cut into
    pieces, the parts are the same once neighbours are joined.
    """

    def __init__(self, opened: bool) -> None:
        self._opened = opened
        self._buffer = ""
        self._state: Callable[[list[Part]], bool] = self._start

    def push(self, text: str) -> list[Part]:
        """Take in text; the parts that are certain now."""
        self._buffer += text
        parts: list[Part] = []
        while self._state(parts):
            pass
        return merged(parts)

    def finish(self) -> list[Part]:
        """What was held back, at the end of the text."""
        rest, self._buffer = self._buffer, ""
        if self._state == self._inside or (self._state == self._start and self._opened):
            return merged([Reasoning(rest.rstrip())])
        return merged([Content(rest)]) if self._state in (self._start, self._content) else []

    def _start(self, parts: list[Part]) -> bool:
        text = self._buffer.lstrip()
        if OPEN_THOUGHT.startswith(text) and text != OPEN_THOUGHT:
            return False
        if text.startswith(OPEN_THOUGHT):
            self._buffer = text[len(OPEN_THOUGHT) :]
        self._state = self._before if self._opened or text.startswith(OPEN_THOUGHT) else self._content
        return True

    def _before(self, parts: list[Part]) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._inside
        return bool(self._buffer)

    def _inside(self, parts: list[Part]) -> bool:
        end = self._buffer.find(CLOSE_THOUGHT)
        if end >= 0:
            parts.append(Reasoning(self._buffer[:end].rstrip()))
            self._buffer = self._buffer[end + len(CLOSE_THOUGHT) :]
            self._state = self._after
            return True
        safe = len(self._buffer[: len(self._buffer) - partial_end(self._buffer, CLOSE_THOUGHT)].rstrip())
        parts.append(Reasoning(self._buffer[:safe]))
        self._buffer = self._buffer[safe:]
        return False

    def _after(self, parts: list[Part]) -> bool:
        self._buffer = self._buffer.lstrip()
        if self._buffer:
            self._state = self._content
        return bool(self._buffer)

    def _content(self, parts: list[Part]) -> bool:
        parts.append(Content(self._buffer))
        self._buffer = ""
        return False
