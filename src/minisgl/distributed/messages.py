"""What rank 0 says to the other ranks of its group, and what they say to it: msgspec structs, MessagePack on the wire.

An array is its dtype, its shape and its bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from minisgl.config import Config
from minisgl.core.plan import Masks, StepPlan

DTYPES = frozenset({"<i4", "<i8", "<f4", "|b1"})


class Assign(msgspec.Struct, frozen=True, tag="assign"):
    """To a rank, first: what to build. `config` is resolved; a `folder` that is not there is looked up by its model."""

    config: Config
    folder: str
    max_seq_len: int


class Launch(msgspec.Struct, frozen=True, tag="launch"):
    """To a rank: start this step."""

    plan: StepPlan


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """To a rank: the masks of the step launched last."""

    masks: Masks


class Close(msgspec.Struct, frozen=True, tag="close"):
    """To a rank, last: finish what is launched and leave."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """From a rank, first: its process runs."""

    rank: int


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """From a rank, last: it cannot start or go on, and why. `asked` when what was asked for cannot be honoured."""

    rank: int
    error: str
    asked: bool


ToRank = Assign | Launch | Finish | Close
FromRank = Hello | RankFailed


def encoder() -> msgspec.msgpack.Encoder:
    """An encoder of either side's messages."""
    return msgspec.msgpack.Encoder(enc_hook=_from_array)


def to_rank_decoder() -> msgspec.msgpack.Decoder[ToRank]:
    """A decoder of what rank 0 says; its arrays are the receiver's own."""
    return msgspec.msgpack.Decoder(ToRank, dec_hook=_to_array)


def from_rank_decoder() -> msgspec.msgpack.Decoder[FromRank]:
    """A decoder of what the other ranks say."""
    return msgspec.msgpack.Decoder(FromRank)


def _from_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"{type(value).__name__} has no place in a message")
    assert value.dtype.str in DTYPES
    return value.dtype.str, value.shape, np.ascontiguousarray(value).data.cast("B") if value.size else b""


def _to_array(kind: Any, value: Any) -> Any:
    dtype, shape, data = value
    if dtype not in DTYPES:
        raise ValueError(f"arrays of {dtype!r} have no place in a message")
    return np.frombuffer(data, dtype).reshape(shape).copy()
