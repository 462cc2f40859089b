"""Messages between rank 0 and the workers: msgspec structs in MessagePack, where an array is dtype, shape and bytes.

They go over a link to each worker: a socket, whose end says that the other process is gone.
"""

import socket
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from minisgl.config import Config
from minisgl.core.plan import Masks, StepPlan

T = TypeVar("T")
PREFIX = 4  # bytes before each message: its length
STARTED = b"+"  # what a worker sends before any message, as soon as it runs
HEARTBEAT_SECONDS = 2
SILENCE_MS = 15_000  # of a host that is gone; between processes of one host the kernel reports an end at once


class LoadModel(msgspec.Struct, frozen=True, tag="load"):
    """The first message to a worker. `config` is resolved; a `folder` that is not on its host is looked up by model."""

    config: Config
    folder: str
    max_seq_len: int


class LaunchStep(msgspec.Struct, frozen=True, tag="launch"):
    plan: StepPlan


class FinishStep(msgspec.Struct, frozen=True, tag="finish"):
    masks: Masks


class ShutdownWorker(msgspec.Struct, frozen=True, tag="shutdown"):
    """The last message to a worker: it finishes the steps that are launched and ends."""


class WorkerFailed(msgspec.Struct, frozen=True):
    """From a worker that cannot go on. `user_error`: what was asked for cannot be honoured."""

    error: str
    user_error: bool


ToWorker = LoadModel | LaunchStep | FinishStep | ShutdownWorker


def notice_silence(link: socket.socket) -> None:
    """Have a TCP connection send at once, and end when the other host is silent."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, HEARTBEAT_SECONDS)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, HEARTBEAT_SECONDS)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)


def frame(message: ToWorker | WorkerFailed) -> bytes:
    data = ENCODER.encode(message)
    return len(data).to_bytes(PREFIX, "little") + data


def receive(link: BinaryIO, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, waiting for it; None where the link has ended."""
    try:
        size = int.from_bytes(link.read(PREFIX), "little")
        data = link.read(size)
    except OSError:
        return None
    return decoder.decode(data) if 0 < size == len(data) else None


def _from_array(value: NDArray[Any]) -> Any:
    return value.dtype.str, value.shape, value.tobytes()


def _to_array(kind: Any, value: Any) -> Any:
    dtype, shape, data = value
    return np.frombuffer(data, dtype).reshape(shape).copy()


ENCODER = msgspec.msgpack.Encoder(enc_hook=_from_array)
# Both raise ValueError or ValidationError for other messages; arrays are copies.
TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_to_array)
FROM_WORKER = msgspec.msgpack.Decoder(WorkerFailed)
