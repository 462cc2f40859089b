"""What the API process and a tokenizer process say to each other, over pipes (`framing.py`)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from minisgl.core.types import ModelInfo
from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server.preparation import Preparation
from minisgl.server.prepared import Converted, Kind, Prepared
from minisgl.text.tokenizer import Tokenizer, make_byte_tokenizer

JOBS_EACH = 4
"""Jobs that a process works at together, in threads, so that a short one does not wait for a long one."""


class TokenizerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process needs to prepare requests; the first thing it is told, as a line of JSON."""

    model: ModelInfo
    folder: str
    standin: bool
    max_live: int
    names: tuple[str, ...] = ()
    log_level: str = "INFO"

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, or the one that stands in for it; raises ModelError."""
        return make_byte_tokenizer(self.model.vocab_size) if self.standin else Tokenizer.load(Path(self.folder))

    def preparation(self) -> Preparation:
        """What prepares requests; raises ModelError."""
        return Preparation(self.model, self.tokenizer(), self.max_live, self.names)


class Job(msgspec.Struct, frozen=True):
    """To the process: prepare this. `number` comes back with the outcome."""

    number: int
    kind: Kind
    body: bytes


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The request can never be served as it is; the parts of the error that a client sees."""

    status: int
    error_type: str
    code: str | None
    message: str
    param: str | None

    @classmethod
    def of(cls, error: MinisglError) -> Refused:
        """The parts of an error."""
        return cls(
            status=error.status, error_type=error.type, code=error.code, message=error.message, param=error.param
        )

    def error(self) -> MinisglError:
        """An error of these parts."""
        error: MinisglError = InvalidRequestError(self.message, param=self.param)
        error.status, error.type, error.code = self.status, self.error_type, self.code
        return error


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """A fault of ours; the process has logged it."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """From the process: what came of a job."""

    number: int
    outcome: Prepared | Converted | Refused | Broken


class TokenizerReady(msgspec.Struct, frozen=True, tag="ready"):
    """From the process, once: the tokenizer is loaded."""


class TokenizerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """From the process, last: the tokenizer cannot be loaded, and why."""

    error: str


FromTokenizer = Done | TokenizerReady | TokenizerFailed
