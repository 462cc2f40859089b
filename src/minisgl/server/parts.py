"""What an answer's text consists of: reasoning, content and calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model thought."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """Text that the model said."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """The `index`-th call begins, and whom it calls."""

    index: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, the text of a JSON object."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete and well-formed."""

    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class CallBroken:
    """What had begun as a call is none. `raw` is all of its text, `rest` what of it was not given as arguments."""

    index: int
    raw: str
    rest: str


Part = Reasoning | Content | CallStart | CallArguments | CallEnd | CallBroken


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same with neighbouring texts of one kind joined, and empty ones left out."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, (Content, Reasoning, CallArguments)) and not part.text:
            continue
        if isinstance(part, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            joined[-1] = CallArguments(part.index, last.text + part.text)
        else:
            joined.append(part)
    return joined


def partial_end(text: str, marker: str) -> int:
    """The length of the longest end of `text` that is a beginning of `marker`, but not all of it."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
