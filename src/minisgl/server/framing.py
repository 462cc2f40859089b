"""Messages over pipes: the length of each, and MessagePack."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import TypeVar

import msgspec

HEAD = struct.Struct("<I")
"""The length of what follows, in bytes."""
T = TypeVar("T")


def framed(message: msgspec.Struct) -> bytes:
    """A message with its length before it."""
    payload = msgspec.msgpack.encode(message)
    return HEAD.pack(len(payload)) + payload


async def unframed(stream: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> AsyncIterator[T]:
    """The messages that come, until nobody is left to send one."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            (size,) = HEAD.unpack(await stream.readexactly(HEAD.size))
            yield decoder.decode(await stream.readexactly(size))
