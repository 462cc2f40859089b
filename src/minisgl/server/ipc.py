"""The messages between a server's processes: MessagePack over ZeroMQ, and lines of JSON on stdin and stdout.

Each API process has a *link* to the engine. Link 0 is the launcher's, which serves HTTP itself when it is the only one.
"""

from __future__ import annotations

import logging
from typing import Literal

import msgspec

from minisgl.config import Config
from minisgl.core.types import EngineStats, ModelInfo, Request, TokenEvent

LAUNCHER = 0
Action = Literal["stats", "flush_cache", "abort"]


class EngineSetup(msgspec.Struct, frozen=True):
    """To the engine process, on its stdin. `folder` has the sockets."""

    config: Config
    folder: str


class WorkerSetup(EngineSetup, frozen=True):
    """To an API process, on its stdin."""

    counts: str  # the folder of Prometheus' files
    listener: int  # an inherited file descriptor
    started: float  # s, on the monotonic clock
    row: int = 0
    link: int = LAUNCHER


class Serving(msgspec.Struct, frozen=True):
    """From an API process, on its stdout: it takes connections, or cannot because of `error`."""

    model: str = ""
    chats: bool = False
    has_tokenizer: bool = True  # False: text is bytes
    error: str | None = None


class Add(msgspec.Struct, frozen=True, tag=True):
    """To the engine: take this request; its events go to `link`."""

    request: Request
    link: int = LAUNCHER


class Abort(msgspec.Struct, frozen=True, tag=True):
    """To the engine: end these requests; ids that are not live are ignored."""

    ids: list[str]


class Query(msgspec.Struct, frozen=True, tag=True):
    """To the engine: do this between two steps, and reply.

    `flush_cache` drops every cached page that no request uses; `abort` ends the requests of a completion, or all
    (None), of every link: their processes get events that finish with `ABORT`.
    """

    nonce: int
    link: int = LAUNCHER
    action: Action = "stats"
    completion_id: str | None = None


class Attach(msgspec.Struct, frozen=True, tag=True):
    """To the engine, from the launcher: an API process has bound the addresses of this link; it is told `Ready` too."""

    link: int


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


class Reply(msgspec.Struct, frozen=True, tag=True):
    """From the engine, to the query with this nonce. `count` is of pages flushed or requests aborted."""

    nonce: int
    stats: EngineStats
    count: int = 0


ToEngine = Add | Abort | Query | Attach | Detach
FromEngine = Ready | Failed | Events | Reply


def addresses(folder: str, link: int) -> tuple[str, str]:
    """Of a link: to the engine, and from it."""
    return f"ipc://{folder}/to{link}", f"ipc://{folder}/from{link}"


def belongs_to(request_id: str, completion_id: str | None) -> bool:
    """Whether a request is one of this completion's, whose id and an index make the request's; None means all."""
    return completion_id is None or request_id == completion_id or request_id.rpartition("-")[0] == completion_id


def start_logging(config: Config, process: str = "") -> None:
    logging.basicConfig(level=config.log_level, format=f"%(asctime)s %(levelname)s {process}%(name)s: %(message)s")
    if config.log_level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")  # it would say what we say ourselves
