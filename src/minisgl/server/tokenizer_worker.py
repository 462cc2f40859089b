"""A tokenizer process, seen from its parent: start it, give it jobs, hear what came of them, end it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence

import msgspec

from minisgl.server.framing import framed, unframed
from minisgl.server.prepared import Converted, Kind, Prepared
from minisgl.server.tokenizer_messages import FromTokenizer, Job, TokenizerSetup

TOKENIZER_COMMAND = (sys.executable, "-m", "minisgl.server.tokenizer_process")
STOP_SECONDS = 1.0
"""How long a process gets to go by itself."""

Outcome = asyncio.Future[Prepared | Converted]


class PendingJob:
    """A job that is not done; `outcome` is what somebody waits for, cancelled when nobody does any more."""

    def __init__(self, kind: Kind, body: bytes) -> None:
        self.kind = kind
        self.body = body
        self.outcome: Outcome = asyncio.get_running_loop().create_future()
        self.held = False


class TokenizerWorker:
    """A running tokenizer process. Make one with `start`, end it with `stop`; `held` are its jobs by number."""

    def __init__(self, process: Process) -> None:
        self.held: dict[int, PendingJob] = {}
        self._process = process
        self._number = 0
        self._decoder: msgspec.msgpack.Decoder[FromTokenizer] = msgspec.msgpack.Decoder(FromTokenizer)

    @classmethod
    async def start(cls, setup: TokenizerSetup, command: Sequence[str] = TOKENIZER_COMMAND) -> TokenizerWorker:
        """Start the process, in a session of its own, so that Ctrl-C in the terminal reaches the parent alone.

        Raises OSError when the system has no room for it.
        """
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(setup) + b"\n")
        return cls(process)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def send(self, job: PendingJob) -> None:
        """Hand over a job. It is lost when the process has ended, which `messages` tells."""
        assert self._process.stdin is not None
        self._number += 1
        self.held[self._number] = job
        job.held = True
        self._process.stdin.write(framed(Job(self._number, job.kind, job.body)))
        job.body = b""

    async def messages(self) -> AsyncIterator[FromTokenizer]:
        """What the process says, until its end."""
        assert self._process.stdout is not None
        async for message in unframed(self._process.stdout, self._decoder):
            yield message

    async def stop(self) -> int:
        """End the process: its stdin is closed, and then it is made to; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        ended = asyncio.ensure_future(self._process.wait())
        await asyncio.wait((ended,), timeout=STOP_SECONDS)
        if not ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
        return await ended
