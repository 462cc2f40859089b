"""The messages between a server's processes: MessagePack over Unix sockets, and lines of JSON on stdin and stdout.

The launcher and each API process have a *link* to the engine: a connection to the socket on which it listens.
"""

import logging
from collections.abc import Iterator
from typing import Literal

import msgspec

from minisgl.config import Config
from minisgl.core.types import EngineStats, ModelInfo, Request, TokenEvent

PREFIX = 4  # bytes before each message: its length, the lowest byte first
Action = Literal["stats", "flush_cache", "abort", "debug", "steps"]


class EngineSetup(msgspec.Struct, frozen=True):
    """To the engine process, on its stdin."""

    config: Config
    folder: str  # of the sockets


class WorkerSetup(EngineSetup, frozen=True):
    """To an API process, on its stdin."""

    counts: str  # the folder of Prometheus' files
    listener: int  # an inherited file descriptor
    started: float  # s, on the monotonic clock
    row: int = 0


class Serving(msgspec.Struct, frozen=True):
    """From an API process, on its stdout: it takes connections, or cannot because of `error`."""

    model: str = ""
    chats: bool = False
    has_tokenizer: bool = True  # False: text is bytes
    error: str | None = None


# To the engine: take this request, end those (ids that are not live are ignored), or reply between two steps.


class Add(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    ids: list[str]


class Query(msgspec.Struct, frozen=True, tag=True):
    """`flush_cache` drops every cached page that no request uses; `abort` ends the requests of a completion, by its id,
    or all (None), of every link: their processes get events that finish with `ABORT`. `debug` asks for a snapshot,
    `steps` for the steps after the one of this number.
    """

    nonce: int
    action: Action = "stats"
    argument: str | int | None = None


# From the engine: to each link once, that the model is loaded; last, why it cannot start or go on; what a step did; and
# the reply to the query with this nonce.


class Ready(msgspec.Struct, frozen=True, tag=True):
    model: ModelInfo
    folder: str  # has the tokenizer
    notes: list[str]  # what was chosen


class Failed(msgspec.Struct, frozen=True, tag=True):
    error: str


class Events(msgspec.Struct, frozen=True, tag=True):
    events: list[TokenEvent]  # one without tokens and end: the request is admitted, a retracted one once more


class Reply(msgspec.Struct, frozen=True, tag=True):
    nonce: int
    stats: EngineStats
    count: int = 0  # pages flushed, requests aborted, or the number of the last step
    shown: bytes = b""  # JSON, or server-sent events


ToEngine = Add | Abort | Query
FromEngine = Ready | Failed | Events | Reply


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(PREFIX, "little") + data


def cut(unread: bytearray) -> Iterator[bytearray]:
    """Take the whole messages from the front of what has come by a link."""
    while len(unread) >= (end := PREFIX + int.from_bytes(unread[:PREFIX], "little")):
        message = unread[PREFIX:end]
        del unread[:end]
        yield message


def address(folder: str) -> str:
    return f"{folder}/engine"


def belongs_to(request_id: str, completion_id: str | None) -> bool:
    """Whether a request is one of this completion's, whose id and an index make the request's; None means all."""
    return completion_id is None or request_id == completion_id or request_id.rpartition("-")[0] == completion_id


def start_logging(config: Config, process: str = "") -> None:
    logging.basicConfig(level=config.log_level, format=f"%(asctime)s %(levelname)s {process}%(name)s: %(message)s")
    if config.log_level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")  # it would say what we say ourselves
