"""What the processes of a server say to each other: MessagePack over ZeroMQ, and lines of JSON on stdin and stdout.

Each API process has a *link* to the engine. Link 0 is the launcher's, which serves HTTP itself when it is the only one.
A reply repeats the nonce of its question.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from minisgl.config import Config
from minisgl.core.types import EngineStats, ModelInfo, Request, TokenEvent

LAUNCHER = 0


class EngineSetup(msgspec.Struct, frozen=True, tag=True):
    """To the engine process, on its stdin: the addresses are the launcher's."""

    config: Config
    to_engine: str
    from_engine: str


class WorkerSetup(msgspec.Struct, frozen=True, tag=True):
    """To an API process, on its stdin. `listener` is an inherited file descriptor, `started` on the monotonic clock.

    `folder` has the sockets, and what `Metrics` and `ApiProcesses` keep there.
    """

    config: Config
    row: int
    link: int
    folder: str
    listener: int
    started: float


class Serving(msgspec.Struct, frozen=True, tag=True):
    """From an API process, on its stdout: it takes connections. `has_tokenizer` is False where text is bytes."""

    model: str
    chats: bool
    has_tokenizer: bool


class Unable(msgspec.Struct, frozen=True, tag=True):
    """From an API process, on its stdout: it cannot serve, and why."""

    error: str


class Add(msgspec.Struct, frozen=True, tag=True):
    """To the engine: take this request; its events go to `link`."""

    request: Request
    link: int = LAUNCHER


class Abort(msgspec.Struct, frozen=True, tag=True):
    """To the engine: end these requests; ids that are not live are ignored."""

    ids: list[str]


class AbortCompletion(msgspec.Struct, frozen=True, tag=True):
    """To the engine: end the requests of this completion, or all (None), of other links."""

    nonce: int
    link: int
    completion_id: str | None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """To the engine: answer between two steps."""

    nonce: int
    link: int = LAUNCHER


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """To the engine: drop every cached page that no request uses."""

    nonce: int
    link: int = LAUNCHER


class Attach(msgspec.Struct, frozen=True, tag=True):
    """To the engine, from the launcher: an API process has bound these addresses; it is told `Ready` too."""

    link: int
    to_engine: str
    from_engine: str


class Detach(msgspec.Struct, frozen=True, tag=True):
    """To the engine, from the launcher: the process behind this link is gone; end its requests."""

    link: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From the engine, once to each link: the model is loaded; `folder` has its tokenizer, `notes` what was chosen."""

    model: ModelInfo
    folder: str
    notes: list[str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """From the engine, last: it cannot start or go on, and why."""

    error: str


class Events(msgspec.Struct, frozen=True, tag=True):
    """From the engine: what a step did. `admitted` are requests that have a row now, retracted ones once more."""

    events: list[TokenEvent]
    admitted: list[str] = []


class Pong(msgspec.Struct, frozen=True, tag=True):
    nonce: int
    stats: EngineStats


class CacheFlushed(msgspec.Struct, frozen=True, tag=True):
    nonce: int
    pages: int


class CompletionAborted(msgspec.Struct, frozen=True, tag=True):
    nonce: int
    count: int


class Revoked(msgspec.Struct, frozen=True, tag=True):
    """From the engine: an operator who asked another API process has ended these requests."""

    ids: list[str]


ToEngine = Add | Abort | AbortCompletion | Ping | FlushCache | Attach | Detach
FromEngine = Ready | Failed | Events | Pong | CacheFlushed | CompletionAborted | Revoked


def addresses(folder: Path | str, link: int) -> tuple[str, str]:
    """Of a link: to the engine, and from it."""
    return f"ipc://{folder}/to{link}", f"ipc://{folder}/from{link}"


def belongs_to(request_id: str, completion_id: str | None) -> bool:
    """Whether a request is one of this completion's, whose id and an index make the request's; None means all."""
    return completion_id is None or request_id == completion_id or request_id.rpartition("-")[0] == completion_id
