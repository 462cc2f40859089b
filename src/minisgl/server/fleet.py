"""Several API processes in front of one engine: kept alive, given connections, asked for one another, ended together.

Tokens never pass through here: the engine talks to each process directly (`engine/links.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import time
from collections import deque
from typing import Any

import msgspec

from minisgl.config import Config
from minisgl.engine.messages import Attach, Detach
from minisgl.errors import ModelError
from minisgl.server.api_messages import (
    AbortedElsewhere,
    AbortedHere,
    AbortElsewhere,
    AbortHere,
    ApiSetup,
    AskOthers,
    Count,
    Counted,
    EngineGone,
    FromApi,
    Others,
    Serving,
    Stop,
    ToApi,
    Unable,
)
from minisgl.server.api_worker import ApiWorker
from minisgl.server.board import Board
from minisgl.server.child import EngineProcess, describe_status
from minisgl.server.errors import ApiProcessError
from minisgl.server.http import ANSWER_SECONDS
from minisgl.server.tally import NOTHING, total

MOST_DEATHS = 5
DEATHS_SECONDS = 60.0
"""So many API processes may die in so many seconds; with one more the server ends."""
COUNT_SECONDS = 1.0
"""How often each is asked for its counts, of which these are lost at most when it dies, and how long it may take."""
LAST_SECONDS = ANSWER_SECONDS + 1.0
"""How long they may take to end when nothing is to be answered any more but with an error."""

logger = logging.getLogger(__name__)


class Fleet:
    """`config.api_workers` processes. Make one with `start`, end it with `close`. Belongs to one event loop."""

    def __init__(self, config: Config, engine: EngineProcess, started: float, spares: list[ApiWorker]) -> None:
        self.board = Board.create(engine.folder / "board", config.api_workers)
        self._config = config
        self._engine = engine
        self._began = started
        self._spares = spares
        self._workers: dict[int, ApiWorker] = {}
        """Those that serve, by row."""
        self._some = asyncio.Event()
        self._past = NOTHING
        """What those that are gone had counted."""
        self._links = itertools.count(1)
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS + 1)
        self._stopping = False
        self._answering: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = loop.create_future()
        """Done, with an ApiProcessError, when they die too often."""
        self._serving: list[asyncio.Future[Serving]] = [loop.create_future() for _ in range(config.api_workers)]
        self._keeping = [asyncio.create_task(self._keep(row)) for row in range(config.api_workers)]
        self._counting = asyncio.create_task(self._count_often())

    @classmethod
    async def start(
        cls, config: Config, engine: EngineProcess, started: float, spares: list[ApiWorker]
    ) -> tuple[Fleet, Serving]:
        """Have them serve an engine that is ready, and wait until all do. Raises ModelError when one cannot.

        `spares` are processes that have been started already; those that are used are taken out. `started` is when the
        server was, on the monotonic clock.
        """
        fleet = cls(config, engine, started, spares)
        try:
            serving = await asyncio.gather(*fleet._serving)
        except BaseException:
            await fleet.close()
            raise
        return fleet, serving[0]

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return self.board.held().live

    async def place(self, listener: socket.socket) -> None:
        """Accept connections for as long as this runs, and give each to the process that has the fewest."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.error("no connection can be accepted for now: %s", error)
                await asyncio.sleep(1.0)
                continue
            with connection:
                await self._some.wait()
                while not any(worker.give(connection) for worker in self._by_load()):
                    await asyncio.sleep(0.05)

    def _by_load(self) -> list[ApiWorker]:
        """The fewest connections first, of equals the one that had fewer so far; last those that do not answer."""

        def load(worker: ApiWorker) -> tuple[bool, int, int]:
            return worker.silent, worker.given - self.board.closed(worker.row), worker.given

        return sorted(self._workers.values(), key=load)

    async def drain(self, hurry: asyncio.Event, timeout: float) -> None:
        """Have all answer what they have, for `timeout` s, or until `hurry` or the engine's end, and wait for it."""
        self._tell(Stop())
        hurried = asyncio.create_task(hurry.wait())
        over = asyncio.ensure_future(asyncio.wait(self._keeping))
        await asyncio.wait(
            (over, hurried, self._engine.ended),
            timeout=timeout + LAST_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        self._tell(EngineGone() if self._engine.ended.done() else Stop(hurry=True))
        await asyncio.wait((over,), timeout=LAST_SECONDS)
        for task in (over, hurried):
            task.cancel()

    async def give_up(self) -> None:
        """Have all tell those who wait that there is no engine, and wait until they are gone."""
        self._tell(EngineGone())
        await asyncio.wait(self._keeping, timeout=LAST_SECONDS)

    async def close(self) -> None:
        """End what still runs."""
        self._stopping = True
        tasks = [*self._keeping, *self._answering, self._counting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        outcomes: list[asyncio.Future[Any]] = [*self._serving, self.failed]
        for outcome in outcomes:
            if outcome.done() and not outcome.cancelled():
                outcome.exception()  # nobody may have asked
        self.board.close()

    def _tell(self, message: ToApi) -> None:
        self._stopping = True
        for worker in self._workers.values():
            worker.send(message)

    async def _keep(self, row: int) -> None:
        """Have one process, at every time."""
        serving = self._serving[row]
        while True:
            try:
                end = f"ended with {describe_status(await self._run(row))}"
            except OSError as error:
                end = f"cannot be started: {error}"
            if self._stopping:
                return
            if not serving.done():
                serving.set_exception(ModelError(f"API process {row} {end} before it could serve"))
            if serving.exception() is not None:
                return
            self._deaths.append(time.monotonic())
            if len(self._deaths) > MOST_DEATHS and self._deaths[-1] - self._deaths[0] < DEATHS_SECONDS:
                if not self.failed.done():
                    self.failed.set_exception(
                        ApiProcessError(f"API process {row} {end}, the last of too many in {DEATHS_SECONDS:.0f} s")
                    )
                return
            logger.error("API process %d %s; its requests are ended, and another one is started", row, end)

    async def _run(self, row: int) -> int:
        """One life of a process; its exit status. Nothing of it is left in the engine."""
        link, folder = next(self._links), self._engine.folder
        setup = ApiSetup(
            config=self._config,
            row=row,
            link=link,
            to_engine=f"ipc://{folder}/t{link}",
            from_engine=f"ipc://{folder}/f{link}",
            board=str(folder / "board"),
            connections=-1,
            started=self._began,
        )
        worker = self._spares.pop() if self._spares else await ApiWorker.start()
        worker.begin(setup)
        self._engine.service.send(Attach(link, setup.to_engine, setup.from_engine))
        try:
            async for message in worker.messages():
                self._take(worker, message)
        except Exception:
            logger.exception("what API process %d says cannot be read", row)
        finally:
            if self._workers.get(row) is worker:
                del self._workers[row]
            if not self._workers:
                self._some.clear()
            status = await asyncio.shield(asyncio.create_task(worker.stop()))
            self._engine.service.send(Detach(link))
            self._past = self._past.plus(worker.tally.settled)
            self.board.clear(row)
        return status

    def _take(self, worker: ApiWorker, message: FromApi) -> None:
        match message:
            case Serving():
                self._workers[worker.row] = worker
                self._some.set()
                if not self._serving[worker.row].done():
                    self._serving[worker.row].set_result(message)
                if self._stopping:  # it did not hear
                    worker.send(EngineGone() if self._engine.ended.done() else Stop())
            case Unable(error):
                if not self._serving[worker.row].done():
                    self._serving[worker.row].set_exception(ModelError(error))
            case Counted() | AbortedHere():
                worker.take(message)
            case AskOthers() | AbortElsewhere():
                answering = asyncio.create_task(self._answer(worker, message))
                self._answering.add(answering)
                answering.add_done_callback(self._answering.discard)

    async def _answer(self, worker: ApiWorker, question: AskOthers | AbortElsewhere) -> None:
        others = [other for other in self._workers.values() if other is not worker]
        match question:
            case AskOthers(number, timeout):
                heard = await asyncio.gather(*(self._count(other, timeout) for other in others))
                counts = [
                    other.tally if ok else msgspec.structs.replace(other.tally, processes=0)
                    for other, ok in zip(others, heard, strict=True)
                ]
                worker.send(Others(number, total([self._past, *counts]), heard.count(False)))
            case AbortElsewhere(number, answer_id):
                asked = (other.ask(AbortedHere, lambda n: AbortHere(n, answer_id), COUNT_SECONDS) for other in others)
                said = await asyncio.gather(*asked)
                worker.send(AbortedElsewhere(number, sum(one.count for one in said if one is not None)))

    async def _count(self, worker: ApiWorker, timeout: float) -> bool:
        """Have a process' counts up to date; whether it answers. One that dies meanwhile does not count as silent."""
        said = await worker.ask(Counted, Count, timeout)
        if said is not None:
            worker.tally = said.tally
        return said is not None or self._workers.get(worker.row) is not worker

    async def _count_often(self) -> None:
        while True:
            await asyncio.sleep(COUNT_SECONDS)
            await asyncio.gather(*(self._count(worker, COUNT_SECONDS) for worker in list(self._workers.values())))


async def start_spares(count: int, spares: list[ApiWorker]) -> None:
    """Start processes that will be needed, while the engine loads; if that fails, a `Fleet` will say so."""
    with contextlib.suppress(OSError):
        for _ in range(count):
            spares.append(await ApiWorker.start())
