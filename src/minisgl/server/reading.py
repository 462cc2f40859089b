"""Reading an answer's text: reasoning first, then content with calls in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from minisgl.core.types import CLOSE_THOUGHT, OPEN_THOUGHT
from minisgl.server.callforms import CallForm
from minisgl.server.parts import Content, Part, merged
from minisgl.server.thinking import ThinkSplitter
from minisgl.server.toolcalls import ToolParser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How the answers to a request are read. `form` None finds no calls, and `id_form` makes the ids of those found.

    `names` are the functions that can be called, `limit` bounds the calls. With `thinks` reasoning is split off, and
    with `in_thought` the answer begins within it.
    """

    form: CallForm | None = None
    names: frozenset[str] = frozenset()
    limit: int | None = None
    thinks: bool = False
    in_thought: bool = False

    @property
    def keep(self) -> tuple[str, ...]:
        """Special tokens whose text must be seen here."""
        marks = (OPEN_THOUGHT, CLOSE_THOUGHT) if self.thinks else ()
        if self.form is None or self.form.at_start:
            return marks
        return (*marks, *filter(None, (self.form.opening, self.form.closing)))

    def reader(self) -> Reader | None:
        """What reads one answer; None where all of it is content."""
        if self.form is None and not self.thinks:
            return None
        splitter = ThinkSplitter(self.in_thought) if self.thinks else None
        return Reader(splitter, None if self.form is None else ToolParser(self.form, self.names, self.limit))


class Reader:
    """Reads one answer, while it is coming or as a whole."""

    def __init__(self, splitter: ThinkSplitter | None, tools: ToolParser | None) -> None:
        self._splitter = splitter
        self._tools = tools

    def push(self, text: str) -> list[Part]:
        """Take in text; the parts that are certain now."""
        return self._find_calls([Content(text)] if self._splitter is None else self._splitter.push(text))

    def finish(self) -> list[Part]:
        """What was held back, at the end of the text."""
        parts = self._find_calls([] if self._splitter is None else self._splitter.finish())
        return merged([*parts, *([] if self._tools is None else self._tools.finish())])

    def _find_calls(self, parts: Iterable[Part]) -> list[Part]:
        if self._tools is None:
            return list(parts)
        found: list[Part] = []
        for part in parts:
            found += self._tools.push(part.text) if isinstance(part, Content) else [part]
        return found
