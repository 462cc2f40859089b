"""The workers as rank 0 sees them: the messages, of which nothing else is accepted, and who was the first to fail."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from minisgl.config import Config
from minisgl.distributed import messages, worker_pool
from minisgl.distributed.messages import (
    FinishStep,
    FromWorker,
    LaunchStep,
    LoadModel,
    ToWorker,
    WorkerFailed,
    WorkerStarted,
)
from minisgl.distributed.worker_pool import WorkerPool
from minisgl.errors import ConfigError, EngineDeadError
from minisgl.gpu.memory import prefill_plan


class FakeWorker:
    """A worker's sockets, without the worker."""

    def __init__(self, rank: int, pool: WorkerPool) -> None:
        self.context = zmq.Context()
        self.plans, self.reports = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        self.plans.connect(pool.addresses[rank - 1])
        self.reports.connect(pool.addresses[-1])
        self.report(WorkerStarted(rank))

    def report(self, message: FromWorker) -> None:
        self.reports.send(messages.ENCODER.encode(message))

    def end(self) -> None:
        self.context.destroy(linger=200)


ENDED = "rank 1 of 3 ended"
RESET = WorkerFailed(2, "connection reset by peer", user_error=False)


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        (("1 ends", RESET), EngineDeadError, ENDED),
        ((RESET, "1 ends"), EngineDeadError, ENDED),
        ((RESET, WorkerFailed(1, "out of memory", False), "1 ends"), EngineDeadError, "rank 1 of 3: out of memory"),
        ((RESET,), EngineDeadError, "rank 2 of 3: connection reset"),
        ((WorkerFailed(2, "--num-pages 9 needs more", True),), ConfigError, "rank 2 of 3: --num-pages 9"),
    ],
)
def test_the_worker_that_failed_first_is_named_and_not_who_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    events: tuple[str | WorkerFailed, ...],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(worker_pool, "LAST_REPORT_MS", 1500)  # this machine may be busy
    pool = WorkerPool(3, f"ipc://{tmp_path}/*")
    workers = [FakeWorker(1, pool), FakeWorker(2, pool)]
    try:
        pool.wait_until_started()
        for event in events:
            if isinstance(event, WorkerFailed):
                workers[event.rank - 1].report(event)
            else:
                workers[0].end()
        with pytest.raises(kind, match=message), pool.name_the_cause():
            raise RuntimeError("a collective failed")
    finally:
        for worker in workers:
            worker.end()
        pool.close()


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
        WorkerFailed(1, "why", True),
    ],
)
def test_messages_arrive_as_they_were_sent(message: ToWorker | FromWorker) -> None:
    data = messages.ENCODER.encode(message)
    decoder = messages.FROM_WORKER if isinstance(message, WorkerFailed) else messages.TO_WORKER
    assert equal(decoder.decode(data), message)


def test_the_arrays_of_a_plan_are_the_receivers_own() -> None:
    plan = prefill_plan(3, 5, True)
    received = messages.TO_WORKER.decode(messages.ENCODER.encode(LaunchStep(plan)))
    assert isinstance(received, LaunchStep)
    received.plan.prefill_tokens[:] = 7
    assert not plan.prefill_tokens.any()


def test_other_messages_and_arrays_are_refused() -> None:
    with pytest.raises((ValueError, msgspec.ValidationError), match="cannot be received in a message"):
        messages.TO_WORKER.decode(msgspec.msgpack.encode({"type": "finish", "masks": ["|O8", [1], b"\0" * 8]}))
    with pytest.raises(msgspec.ValidationError):
        messages.TO_WORKER.decode(msgspec.msgpack.encode({"type": "run", "code": "x"}))
