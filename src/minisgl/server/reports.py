"""The objects of the operator's endpoints: what they answer, and what /abort_request takes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from minisgl.core.types import EngineStats


class AbortOrder(msgspec.Struct, forbid_unknown_fields=True):
    """What /abort_request takes: the id of an answer, or `abort_all`."""

    rid: str | None = None
    abort_all: bool = False


class IsReady(msgspec.Struct, frozen=True):
    """New requests are taken."""

    status: Literal["ready"] = "ready"


class Version(msgspec.Struct, frozen=True):
    """The version of this program."""

    version: str


class Queued(msgspec.Struct, frozen=True):
    """Requests without their first token, and the tokens of their prompts."""

    requests: int
    tokens: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`config` is what was said, `effective` a line for each value that was chosen; `uptime` is in s."""

    version: str
    config: dict[str, Any]
    effective: list[str]
    stats: EngineStats
    queued: Queued
    draining: bool
    uptime: float


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The model: its names, where its files are, and what it can take."""

    id: str
    served_names: list[str]
    model_path: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    has_chat_template: bool


class Flush(msgspec.Struct, frozen=True):
    """Pages that were dropped from the prefix cache."""

    flushed_pages: int


class Aborted(msgspec.Struct, frozen=True):
    """Requests that were ended."""

    aborted: int
