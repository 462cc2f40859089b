"""Messages between rank 0 and the workers: msgspec structs in MessagePack, where an array is dtype, shape and bytes."""

from typing import Any

import msgspec
import numpy as np
import zmq

from minisgl.config import Config
from minisgl.core.plan import Masks, StepPlan

DTYPES = frozenset({"<i4", "<i8", "<f4", "|b1"})
HEARTBEAT_MS = 2000
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


class WorkerStarted(msgspec.Struct, frozen=True, tag="started"):
    rank: int


class WorkerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The last message from a worker that cannot go on. `user_error`: what was asked for cannot be honoured."""

    rank: int
    error: str
    user_error: bool


ToWorker = LoadModel | LaunchStep | FinishStep | ShutdownWorker
FromWorker = WorkerStarted | WorkerFailed


def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, linger_ms: int) -> zmq.Socket[bytes]:
    """A socket with unbounded queues that is to be bound or connected to `address`."""
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, linger_ms)
    if address.startswith("tcp"):
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    return socket


def _from_array(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"{type(value).__name__} cannot be sent in a message")
    assert value.dtype.str in DTYPES
    return value.dtype.str, value.shape, np.ascontiguousarray(value).data.cast("B") if value.size else b""


def _to_array(kind: Any, value: Any) -> Any:
    dtype, shape, data = value
    if dtype not in DTYPES:
        raise ValueError(f"arrays of {dtype!r} cannot be received in a message")
    return np.frombuffer(data, dtype).reshape(shape).copy()


ENCODER = msgspec.msgpack.Encoder(enc_hook=_from_array)
# Both raise ValueError or ValidationError for other messages; arrays are copies.
TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker, dec_hook=_to_array)
FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
