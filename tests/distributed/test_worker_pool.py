"""The workers as rank 0 sees them: which of them it says was the first to fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from minisgl.distributed import worker_pool
from minisgl.distributed.messages import ENCODER, FromWorker, WorkerFailed, WorkerStarted
from minisgl.distributed.worker_pool import WorkerPool
from minisgl.errors import ConfigError, EngineDeadError


class FakeWorker:
    """A worker's sockets, without the worker."""

    def __init__(self, rank: int, pool: WorkerPool) -> None:
        self.context = zmq.Context()
        self.plans, self.reports = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        self.plans.connect(pool.addresses[rank - 1])
        self.reports.connect(pool.addresses[-1])
        self.report(WorkerStarted(rank))

    def report(self, message: FromWorker) -> None:
        self.reports.send(ENCODER.encode(message))

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
