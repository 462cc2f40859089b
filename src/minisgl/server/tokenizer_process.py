"""A tokenizer process: it prepares requests for the API process. Started by it, one line of JSON on its stdin.

The line is a `TokenizerSetup`. Jobs follow on stdin and outcomes go to stdout. The end of stdin means that nobody is
left to work for, and the process ends at once, in the middle of whatever it does.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec

from minisgl.errors import MinisglError, ModelError
from minisgl.server.framing import HEAD, framed
from minisgl.server.preparation import Preparation
from minisgl.server.tokenizer_messages import (
    JOBS_EACH,
    Broken,
    Done,
    FromTokenizer,
    Job,
    Refused,
    TokenizerFailed,
    TokenizerReady,
    TokenizerSetup,
)

logger = logging.getLogger(__name__)


class Outbox:
    """Whole messages to the API process, from several threads."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: FromTokenizer) -> None:
        """Say it; when the API process is gone there is nobody to tell."""
        data = framed(message)
        with self._lock:
            try:
                self._pipe.write(data)
                self._pipe.flush()
            except BrokenPipeError:
                os._exit(0)


def work(preparation: Preparation, job: Job, outbox: Outbox) -> None:
    """Do a job and say what came of it."""
    outcome: Done
    try:
        outcome = Done(job.number, preparation.prepare(job.kind, job.body))
    except MinisglError as error:
        outcome = Done(job.number, Refused.of(error))
    except Exception:
        logger.exception("a request to %s cannot be prepared", job.kind)
        outcome = Done(job.number, Broken())
    outbox.send(outcome)


def serve(stdin: IO[bytes], outbox: Outbox) -> int:
    """Work until the end of stdin; the exit status of a process that could not start."""
    setup = msgspec.json.decode(stdin.readline(), type=TokenizerSetup)
    logging.basicConfig(level=setup.log_level, format="%(asctime)s %(levelname)s tokenizer %(name)s: %(message)s")
    try:
        preparation = setup.preparation()
    except ModelError as error:
        outbox.send(TokenizerFailed(error.message))
        return 1
    outbox.send(TokenizerReady())
    decoder = msgspec.msgpack.Decoder(Job)
    pool = ThreadPoolExecutor(JOBS_EACH)
    while len(head := stdin.read(HEAD.size)) == HEAD.size:
        (size,) = HEAD.unpack(head)
        payload = stdin.read(size)
        if len(payload) < size:
            break
        pool.submit(work, preparation, decoder.decode(payload), outbox)
    os._exit(0)


def main() -> int:
    """Entry point of `python -m minisgl.server.tokenizer_process`. What libraries print goes to stderr."""
    outbox = Outbox(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return serve(sys.stdin.buffer, outbox)


if __name__ == "__main__":
    sys.exit(main())
