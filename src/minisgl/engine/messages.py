"""What the API process and the engine process say to each other: msgspec structs, MessagePack on the wire.

With several API processes each has a *link* to the engine, and the parent, which serves nobody then, has link 0.
"""

from __future__ import annotations

import msgspec

from minisgl.core.types import EngineStats, ModelInfo, Request, TokenEvent


class Add(msgspec.Struct, frozen=True, tag="add"):
    """To the engine: take this request; what becomes of it goes to `link`."""

    request: Request
    link: int = 0


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """To the engine: end these requests; ids that are not live are ignored."""

    ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """To the engine: answer with a `Pong` between two steps."""

    nonce: int
    link: int = 0


class Flush(msgspec.Struct, frozen=True, tag="flush"):
    """To the engine: drop every cached page that no request uses, and answer with `Flushed`."""

    nonce: int
    link: int = 0


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """To the engine, from its parent: an API process has bound these addresses; it is told `Ready` too."""

    link: int
    to_engine: str
    from_engine: str


class Detach(msgspec.Struct, frozen=True, tag="detach"):
    """To the engine, from its parent: the process behind this link is gone; end its requests."""

    link: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """From the engine, once to each: the model is loaded, its tokenizer is in `folder`; `notes` say what was chosen."""

    model: ModelInfo
    folder: str
    notes: list[str]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """From the engine, last: it cannot start or go on, and why."""

    error: str


class Events(msgspec.Struct, frozen=True, tag="events"):
    """From the engine: what a step did. `admitted` are requests that have a row now, retracted ones once more."""

    events: list[TokenEvent]
    admitted: list[str] = []


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """From the engine: it is alive, and its counts."""

    nonce: int
    stats: EngineStats


class Flushed(msgspec.Struct, frozen=True, tag="flushed"):
    """From the engine: so many pages were dropped from the prefix cache."""

    nonce: int
    pages: int


ToEngine = Add | Abort | Ping | Flush | Attach | Detach
FromEngine = Ready | Failed | Events | Pong | Flushed
