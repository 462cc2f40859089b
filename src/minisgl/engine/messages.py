"""What the API process and the engine process say to each other: msgspec structs, MessagePack on the wire."""

from __future__ import annotations

import msgspec

from minisgl.types import EngineStats, ModelInfo, Request, TokenEvent


class Add(msgspec.Struct, frozen=True, tag="add"):
    """To the engine: take this request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """To the engine: end these requests; ids that are not live are ignored."""

    ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """To the engine: answer with a `Pong` between two steps."""

    nonce: int


class Flush(msgspec.Struct, frozen=True, tag="flush"):
    """To the engine: drop every cached page that no request uses, and answer with `Flushed`."""

    nonce: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """From the engine, once: the model is loaded, its tokenizer is in `folder`, and `notes` says what was chosen."""

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


ToEngine = Add | Abort | Ping | Flush
FromEngine = Ready | Failed | Events | Pong | Flushed
