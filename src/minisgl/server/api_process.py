"""An API process among several: HTTP in front of the engine. Started by the launcher, an `ApiSetup` on its stdin.

Messages follow on stdin, and its own go to stdout. The end of stdin means that the launcher is gone: it ends at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from minisgl.errors import EngineDeadError, MinisglError
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
from minisgl.server.board import Board
from minisgl.server.errors import ApiProcessError
from minisgl.server.framing import framed, unframed
from minisgl.server.front import Front, open_front
from minisgl.server.handoff import HandedServer
from minisgl.server.http import serve_http
from minisgl.server.limits import Limits, Queue
from minisgl.server.service import EngineService
from minisgl.server.tally import NOTHING, Tally

LAUNCHER_SECONDS = 2.0
"""What the launcher may take for an answer beyond what it waits for itself."""

T = TypeVar("T", Others, AbortedElsewhere)


class Launcher:
    """The line to the launcher: what it orders is done, and it is asked about the other processes (`Peers`)."""

    def __init__(self, stdin: BinaryIO, stdout: BinaryIO, service: EngineService) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self.engine_gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.front: Front | None = None
        self._stdin = stdin
        self._stdout = stdout
        self._service = service
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[Any]] = {}

    def send(self, message: FromApi) -> None:
        """Say something. The launcher reads at all times; when it is gone, so are we."""
        data = framed(message)
        while data:
            data = data[os.write(self._stdout.fileno(), data) :]

    async def listen(self) -> None:
        """Do what it says for as long as it is there."""
        loop = asyncio.get_running_loop()
        stream = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), self._stdin)
        decoder: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)
        async for message in unframed(stream, decoder):
            self._do(message)
        os._exit(1)

    def _do(self, message: ToApi) -> None:
        match message:
            case Stop(hurry):
                self.stop.set()
                if hurry:
                    self.hurry.set()
            case EngineGone():
                self._service.fail()
                if not self.engine_gone.done():
                    self.engine_gone.set_result(None)
            case Count(number):
                self.send(Counted(number, self.front.tally if self.front is not None else NOTHING))
            case AbortHere(number, answer_id):
                self.send(AbortedHere(number, self._service.abort(answer_id)))
            case Others(number) | AbortedElsewhere(number):
                answer = self._questions.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(message)

    async def _ask(self, kind: type[T], number: int, question: FromApi, timeout: float) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        try:
            self.send(question)
            async with asyncio.timeout(timeout + LAUNCHER_SECONDS):
                return await answer
        except TimeoutError as error:
            raise ApiProcessError("the process that started this one does not answer") from error
        finally:
            del self._questions[number]

    async def tally(self, timeout: float) -> Tally:
        """What the others have counted together; of one that does not answer in time, what it said last."""
        number = next(self._numbers)
        return (await self._ask(Others, number, AskOthers(number, timeout), timeout)).tally

    async def abort(self, answer_id: str | None) -> int:
        """End the requests of an answer wherever else it is made, or all (None), and say how many those were."""
        number = next(self._numbers)
        return (await self._ask(AbortedElsewhere, number, AbortElsewhere(number, answer_id), 1.0)).count

    async def check(self, timeout: float) -> None:
        """Raise ApiProcessError when one of them does not answer in time."""
        number = next(self._numbers)
        silent = (await self._ask(Others, number, AskOthers(number, timeout), timeout)).silent
        if silent:
            raise ApiProcessError(f"{silent} of the API processes did not answer within {timeout:g} s")


async def serve(setup: ApiSetup, stdin: BinaryIO, stdout: BinaryIO) -> int:
    """Serve until told to stop; the exit status."""
    config = setup.config
    board = Board(Path(setup.board), config.api_workers)
    queue = Queue(Limits.of(config), board, setup.row)
    service = EngineService(setup.to_engine, setup.from_engine, queue, setup.link)
    launcher = Launcher(stdin, stdout, service)
    listening = asyncio.create_task(launcher.listen())
    try:
        ready = await service.ready()
        async with open_front(
            config, service, ready, tokenizers=setup.tokenizers, started=setup.started, peers=launcher
        ) as front:
            launcher.front = front

            def on_serving() -> None:
                launcher.send(Serving(front.api.model.name, front.chats, front.standin))

            end = socket.socket(fileno=setup.connections)
            server = HandedServer(front.app, on_serving, config, end, lambda: board.count_closed(setup.row))
            await serve_http(
                server, [], service, launcher.engine_gone, launcher.stop, launcher.hurry, config.drain_timeout
            )
    except EngineDeadError:
        return 1
    except MinisglError as error:
        launcher.send(Unable(error.message))
        return 1
    finally:
        listening.cancel()
        await service.close()
    return 0


def main() -> int:
    """Entry point of `python -m minisgl.server.api_process`. What libraries print goes to stderr."""
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    stdin = os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    if not (line := stdin.readline()):
        return 0  # it was never needed
    setup = msgspec.json.decode(line, type=ApiSetup)
    level, form = setup.config.log_level, f"%(asctime)s %(levelname)s api-{setup.row} %(name)s: %(message)s"
    logging.basicConfig(level=level, format=form)
    if level == "INFO":
        logging.getLogger("uvicorn").setLevel("WARNING")
    return asyncio.run(serve(setup, stdin, stdout))


if __name__ == "__main__":
    sys.exit(main())
