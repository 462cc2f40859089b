"""Tokenizer processes that share the requests: the least busy one takes the next, and one that dies is replaced."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence

from minisgl.errors import ModelError
from minisgl.server.child import describe_status
from minisgl.server.errors import OverloadedError, TokenizerDeadError, internal_error
from minisgl.server.prepared import Converted, Kind, Prepared
from minisgl.server.tokenizer_messages import (
    JOBS_EACH,
    Broken,
    Done,
    FromTokenizer,
    Refused,
    TokenizerFailed,
    TokenizerReady,
    TokenizerSetup,
)
from minisgl.server.tokenizer_worker import TOKENIZER_COMMAND, PendingJob, TokenizerWorker

PATIENCE_SECONDS = 1.5
"""How long a request waits while there is no process at all; then it ends with 503."""
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0
"""Seconds between two attempts to replace a process; they double from the first to the longest."""
RETRY_SECONDS = 1
NO_PROCESS = "there is no tokenizer process; another one is being started"

logger = logging.getLogger(__name__)


class TokenizerPool:
    """A number of tokenizer processes. Make one with `start`, end it with `close`. Belongs to one event loop.

    A job belongs to the pool until a process takes it. What a process holds when it dies fails, and is not tried again:
    it may be what killed it.
    """

    def __init__(self, setup: TokenizerSetup, size: int, command: Sequence[str] = TOKENIZER_COMMAND) -> None:
        self.workers: list[TokenizerWorker] = []
        """Those that are ready."""
        self._setup = setup
        self._command = command
        self._pending: deque[PendingJob] = deque()
        self._closing = False
        self._stopping: set[asyncio.Task[int]] = set()
        loop = asyncio.get_running_loop()
        self._started: list[asyncio.Future[None]] = [loop.create_future() for _ in range(size)]
        self._tasks = [asyncio.create_task(self._keep(started)) for started in self._started]

    @classmethod
    async def start(cls, setup: TokenizerSetup, size: int, command: Sequence[str] = TOKENIZER_COMMAND) -> TokenizerPool:
        """Start `size` processes and wait until all are ready. Raises ModelError when one cannot start."""
        pool = cls(setup, size, command)
        try:
            await asyncio.gather(*pool._started)
        except BaseException:
            await pool.close()
            raise
        return pool

    async def prepare(self, kind: Kind, body: bytes) -> Prepared | Converted:
        """What a body asks for; raises InvalidRequestError, OverloadedError or TokenizerDeadError."""
        if len(self._pending) >= self._setup.max_live:
            raise OverloadedError(f"{len(self._pending)} requests wait to be tokenised; try again later", RETRY_SECONDS)
        job = PendingJob(kind, body)
        self._pending.append(job)
        self._hand_out()
        if not self.workers:
            self._fail_later((job,))
        return await job.outcome

    @property
    def num_processes(self) -> int:
        """Processes that are ready."""
        return len(self.workers)

    def check(self) -> None:
        """Raise TokenizerDeadError while there is no process."""
        if not self.workers:
            raise TokenizerDeadError(NO_PROCESS, RETRY_SECONDS)

    async def close(self) -> None:
        """End the processes; what they have not done fails."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._stopping)
        fail(self._pending, "the server is shutting down")
        for started in self._started:
            if started.done() and not started.cancelled():
                started.exception()  # nobody may have asked

    async def _keep(self, started: asyncio.Future[None]) -> None:
        """Have one process, at every time."""
        pause = 0.0
        while not self._closing:
            served = False
            try:
                worker = await TokenizerWorker.start(self._setup, self._command)
                served, status = await self._attend(worker, started)
                end = f"ended with {describe_status(status)}"
            except OSError as error:
                end = f"cannot be started: {error}"
            if not started.done():
                started.set_exception(ModelError(f"a tokenizer process {end} before it was ready"))
            if started.exception() is not None:
                return
            logger.error("a tokenizer process %s; another one is started", end)
            pause = 0.0 if served else min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _attend(self, worker: TokenizerWorker, started: asyncio.Future[None]) -> tuple[bool, int]:
        """Listen to a process until it ends, and clear up after it; whether it was ever ready, and its exit status."""
        served = False
        try:
            async for message in worker.messages():
                self._take(worker, message, started)
        except Exception:
            logger.exception("what a tokenizer process says cannot be read")
        finally:
            if worker in self.workers:
                served = True
                self.workers.remove(worker)
            fail(worker.held.values(), "the tokenizer process ended; the request may be tried again")
            if not self.workers:
                self._fail_later(self._pending)
            stopping = asyncio.create_task(worker.stop())
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)
            status = await asyncio.shield(stopping)  # `close` may come in between
        return served, status

    def _take(self, worker: TokenizerWorker, message: FromTokenizer, started: asyncio.Future[None]) -> None:
        match message:
            case Done(number, outcome):
                waiting = worker.held.pop(number).outcome
                if waiting.done():
                    pass
                elif isinstance(outcome, Refused):
                    waiting.set_exception(outcome.error())
                elif isinstance(outcome, Broken):
                    waiting.set_exception(internal_error())
                else:
                    waiting.set_result(outcome)
            case TokenizerReady():
                self.workers.append(worker)
                if not started.done():
                    started.set_result(None)
            case TokenizerFailed(error):
                if not started.done():
                    started.set_exception(ModelError(error))
        self._hand_out()

    def _hand_out(self) -> None:
        """Give jobs to the least busy processes while one has room."""
        while self._pending and self.workers:
            worker = min(self.workers, key=lambda worker: len(worker.held))
            if len(worker.held) >= JOBS_EACH:
                return
            job = self._pending.popleft()
            if not job.outcome.done():
                worker.send(job)

    def _fail_later(self, jobs: Iterable[PendingJob]) -> None:
        """After a while, fail those that no process has taken, if there is none then either."""
        asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._fail_now, list(jobs))

    def _fail_now(self, jobs: Iterable[PendingJob]) -> None:
        if not self.workers:
            fail((job for job in jobs if not job.held), NO_PROCESS)
            self._pending = deque(job for job in self._pending if not job.outcome.done())


def fail(jobs: Iterable[PendingJob], message: str) -> None:
    """End these jobs with TokenizerDeadError."""
    for job in jobs:
        if not job.outcome.done():
            job.outcome.set_exception(TokenizerDeadError(message, RETRY_SECONDS))
