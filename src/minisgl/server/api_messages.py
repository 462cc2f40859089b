"""What the launcher and an API process among several say to each other, over pipes (`framing.py`)."""

from __future__ import annotations

import msgspec

from minisgl.config import Config
from minisgl.server.tally import Tally


class ApiSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told first, as a line of JSON.

    `row` is its place among its like and on the `board`, which has a row for each; `link` and the addresses are its way
    to the engine, `connections` is the file descriptor of a socket that clients' connections come through, `started`
    when the server was, on the monotonic clock.
    """

    config: Config
    row: int
    link: int
    to_engine: str
    from_engine: str
    board: str
    connections: int
    started: float

    @property
    def tokenizers(self) -> int:
        """Its share of the tokenizer processes."""
        each, rest = divmod(self.config.num_tokenizer, self.config.api_workers)
        return each + (self.row < rest)


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """To the process: take nothing new and end when all is answered; with `hurry` end now."""

    hurry: bool = False


class EngineGone(msgspec.Struct, frozen=True, tag="engine_gone"):
    """To the process: there is no engine any more; tell everyone who waits, and end."""


class Count(msgspec.Struct, frozen=True, tag="count"):
    """To the process: answer with a `Counted` of the same number."""

    number: int


class AbortHere(msgspec.Struct, frozen=True, tag="abort_here"):
    """To the process: end the requests of this answer, or all (None); answer with an `AbortedHere`."""

    number: int
    answer_id: str | None


class Others(msgspec.Struct, frozen=True, tag="others"):
    """To the process: the answer to its `AskOthers`. `silent` are those that said nothing in time."""

    number: int
    tally: Tally
    silent: int


class AbortedElsewhere(msgspec.Struct, frozen=True, tag="aborted_elsewhere"):
    """To the process: the answer to its `AbortElsewhere`."""

    number: int
    count: int


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """From the process, once: it takes connections. `chats` and `standin` are those of its `Front`."""

    model: str
    chats: bool
    standin: bool


class Unable(msgspec.Struct, frozen=True, tag="unable"):
    """From the process, last: it cannot serve, and why."""

    error: str


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """From the process: what it has counted."""

    number: int
    tally: Tally


class AbortedHere(msgspec.Struct, frozen=True, tag="aborted_here"):
    """From the process: so many requests were ended."""

    number: int
    count: int


class AskOthers(msgspec.Struct, frozen=True, tag="ask_others"):
    """From the process: what have the others counted? Asked for by somebody who waits for `timeout` s."""

    number: int
    timeout: float


class AbortElsewhere(msgspec.Struct, frozen=True, tag="abort_elsewhere"):
    """From the process: end the requests of this answer, or all (None), wherever they are."""

    number: int
    answer_id: str | None


ToApi = Stop | EngineGone | Count | AbortHere | Others | AbortedElsewhere
FromApi = Serving | Unable | Counted | AbortedHere | AskOthers | AbortElsewhere
