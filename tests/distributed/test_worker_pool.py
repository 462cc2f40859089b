"""The workers as rank 0 sees them: the messages, of which nothing else is accepted, and who was the first to fail."""

import socket
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from typing import Any

import msgspec
import numpy as np
import pytest

from minisgl.config import Config
from minisgl.distributed import messages, worker_pool
from minisgl.distributed.messages import FinishStep, LaunchStep, LoadModel, ToWorker, WorkerFailed
from minisgl.distributed.worker_pool import WorkerPool
from minisgl.errors import ConfigError, EngineDeadError
from minisgl.gpu.memory import prefill_plan


class FakeWorker:
    """A worker's end of a link, without the worker."""

    def __init__(self, rank: int, pool: WorkerPool) -> None:
        ours, self.link = socket.socketpair()
        self.link.sendall(messages.STARTED)
        pool.listen(rank, ours)

    def report(self, message: WorkerFailed) -> None:
        with suppress(BrokenPipeError):  # the pool has ended its links
            self.link.sendall(messages.frame(message))


ENDED = "rank 1 of 3 ended"
RESET = (2, WorkerFailed("connection reset by peer", user_error=False))


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        (("1 ends", RESET), EngineDeadError, ENDED),
        ((RESET, "1 ends"), EngineDeadError, ENDED),
        ((RESET, (1, WorkerFailed("out of memory", False)), "1 ends"), EngineDeadError, "rank 1 of 3: out of memory"),
        ((RESET,), EngineDeadError, "rank 2 of 3: connection reset"),
        (((2, WorkerFailed("--num-pages 9 needs more", True)),), ConfigError, "rank 2 of 3: --num-pages 9"),
    ],
)
def test_the_worker_that_failed_first_is_named_and_not_who_noticed(
    monkeypatch: pytest.MonkeyPatch,
    events: tuple[str | tuple[int, WorkerFailed], ...],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(worker_pool, "OTHER_CAUSE_SECONDS", 1.5)  # this machine may be busy
    pool = WorkerPool(3)
    workers = [FakeWorker(1, pool), FakeWorker(2, pool)]
    try:
        for event in events:
            if isinstance(event, str):
                workers[0].link.close()
            else:
                workers[event[0] - 1].report(event[1])
        with pytest.raises(kind, match=message), pool.name_the_cause():
            raise RuntimeError("a collective failed")
    finally:
        for worker in workers:
            worker.link.close()
        pool.close()


def test_workers_inherit_nothing_in_the_place_of_a_closed_stream() -> None:
    code = "import os, minisgl.distributed.worker_pool as it; os.close(0); print(it.WorkerPool(1).start('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.rpartition("/")[2]) > 2


def equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, msgspec.Struct):
        return type(one) is type(other) and all(
            equal(getattr(one, name), getattr(other, name)) for name in one.__struct_fields__
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return bool(one == other)


@pytest.mark.parametrize(
    "message",
    [
        LaunchStep(prefill_plan(3, 5, False)),
        LaunchStep(prefill_plan(3, 5, True)),
        FinishStep(np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2]),
        LoadModel(Config(tp=2, dummy_weight=True), "/a/b", 100),
        WorkerFailed("why", True),
    ],
)
def test_messages_arrive_as_they_were_sent(message: ToWorker | WorkerFailed) -> None:
    link = BytesIO(2 * messages.frame(message))
    decoder: Any = messages.FROM_WORKER if isinstance(message, WorkerFailed) else messages.TO_WORKER
    assert equal(messages.receive(link, decoder), message)
    assert equal(messages.receive(link, decoder), message)
    assert messages.receive(link, decoder) is None
    assert messages.receive(BytesIO(messages.frame(message)[:-1]), decoder) is None


def test_the_arrays_of_a_plan_are_the_receivers_own() -> None:
    plan = prefill_plan(3, 5, True)
    received = messages.TO_WORKER.decode(messages.ENCODER.encode(LaunchStep(plan)))
    assert isinstance(received, LaunchStep)
    received.plan.prefill_tokens[:] = 7
    assert not plan.prefill_tokens.any()


def test_other_messages_and_arrays_are_refused() -> None:
    with pytest.raises((ValueError, msgspec.ValidationError), match="OBJECT array"):
        messages.TO_WORKER.decode(msgspec.msgpack.encode({"type": "finish", "masks": ["|O8", [1], b"\0" * 8]}))
    with pytest.raises(msgspec.ValidationError):
        messages.TO_WORKER.decode(msgspec.msgpack.encode({"type": "run", "code": "x"}))
