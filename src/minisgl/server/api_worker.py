"""An API process among several, seen from the launcher: start it, ask it, give it connections, end it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import msgspec

from minisgl.server.api_messages import (
    AbortedHere,
    ApiSetup,
    Counted,
    FromApi,
    ToApi,
)
from minisgl.server.framing import framed, unframed
from minisgl.server.handoff import channel, hand_over
from minisgl.server.tally import NOTHING, Tally

API_COMMAND = (sys.executable, "-m", "minisgl.server.api_process")
STOP_SECONDS = 1.0
"""How long a process gets to go by itself."""

T = TypeVar("T", Counted, AbortedHere)


class ApiWorker:
    """A running API process. Make one with `start`, end it with `stop`. Belongs to one event loop."""

    def __init__(self, process: Process, ours: socket.socket, theirs: int) -> None:
        self.row = -1
        self.link = -1
        self.tally: Tally = NOTHING
        """What it had counted when it was last asked."""
        self.silent = False
        """Whether it did not answer the last question in time."""
        self.given = 0
        """Connections that it was given."""
        self._process = process
        self._end = ours
        self._their_end = theirs
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[Counted | AbortedHere | None]] = {}
        self._decoder: msgspec.msgpack.Decoder[FromApi] = msgspec.msgpack.Decoder(FromApi)

    @classmethod
    async def start(cls, command: Sequence[str] = API_COMMAND) -> ApiWorker:
        """Start a process that gets ready to `begin`. Raises OSError when the system has no room for it.

        It has a session of its own, so that Ctrl-C in the terminal reaches the launcher alone.
        """
        ours, theirs = channel()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=PIPE, stdout=PIPE, start_new_session=True, pass_fds=[theirs.fileno()]
                )
                return cls(process, ours, theirs.fileno())
        except BaseException:
            ours.close()
            raise

    def begin(self, setup: ApiSetup) -> None:
        """Have it serve."""
        assert self._process.stdin is not None
        self.row, self.link = setup.row, setup.link
        setup = msgspec.structs.replace(setup, connections=self._their_end)
        self._process.stdin.write(msgspec.json.encode(setup) + b"\n")

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, message: ToApi) -> None:
        """Tell it something. It is lost when the process has ended, which `messages` tells."""
        assert self._process.stdin is not None
        self._process.stdin.write(framed(message))

    async def ask(self, kind: type[T], question: Callable[[int], ToApi], timeout: float) -> T | None:
        """What it answers, or None when nothing comes in time (s), or it has ended."""
        number = next(self._numbers)
        answer: asyncio.Future[Counted | AbortedHere | None] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        try:
            self.send(question(number))
            async with asyncio.timeout(timeout):
                said = await answer
        except TimeoutError:
            self.silent = True
            return None
        finally:
            del self._questions[number]
        assert said is None or isinstance(said, kind)
        return said

    def take(self, said: Counted | AbortedHere) -> None:
        """An answer has come."""
        self.silent = False
        answer = self._questions.get(said.number)
        if answer is not None and not answer.done():
            answer.set_result(said)

    def give(self, connection: socket.socket) -> bool:
        """Have it serve a connection; whether it could be given."""
        given = hand_over(connection, self._end)
        self.given += given
        return given

    async def messages(self) -> AsyncIterator[FromApi]:
        """What it says, until its end."""
        assert self._process.stdout is not None
        async for message in unframed(self._process.stdout, self._decoder):
            yield message

    async def stop(self) -> int:
        """End the process: its stdin is closed, and then it is made to; its exit status."""
        assert self._process.stdin is not None
        for answer in self._questions.values():
            if not answer.done():
                answer.set_result(None)
        self._process.stdin.close()
        self._end.close()
        ended = asyncio.ensure_future(self._process.wait())
        await asyncio.wait((ended,), timeout=STOP_SECONDS)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
        return await ended
