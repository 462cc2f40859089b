"""A process that tries grammars out, each in a child of its own that ends when its time or memory is used up.

It is `python -m minisgl.grammar.helper FD SOURCE`: a socket, and a `VocabularySource` as JSON. It loads the vocabulary
once, says so with a `Verdict`, and then takes a connection for each grammar through the socket (SCM_RIGHTS), whose end
ends it.
The child says on its connection that it is there (`HERE`), then its `Verdict`, or it dies: the kernel's timers and
limits bound also what library code does without ever coming back to Python.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import warnings

import msgspec

from minisgl.errors import InvalidRequestError, MinisglError, UnsupportedParameterError
from minisgl.grammar.matcher import compile_grammar, probe
from minisgl.grammar.source import invalid
from minisgl.grammar.vocabulary import Vocabulary, VocabularySource
from minisgl.types import Grammar

CPU_SECONDS = 1.0
WALL_SECONDS = 1.7
MEMORY_BYTES = 1 << 30
"""What a grammar may add to the process, as address space."""
PROBE_STEPS = 32
CHUNK = 1 << 16
HERE = b"+"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a grammar; without an error it can be followed."""

    error: str | None = None
    param: str | None = None
    unsupported: bool = False


def main() -> None:
    """Serve until the socket ends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    source = msgspec.json.decode(sys.argv[2], type=VocabularySource)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Threads there may be are numpy's; they idle, and the children use none.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    try:
        vocabulary = Vocabulary(source)
    except MinisglError as error:
        control.sendall(msgspec.json.encode(as_verdict(error)))
        return
    control.sendall(msgspec.json.encode(Verdict()))
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        with socket.socket(fileno=fds[0]) as connection:
            if os.fork() == 0:
                control.close()
                with contextlib.suppress(BrokenPipeError):
                    try_out(connection, vocabulary)
                os._exit(0)


def try_out(connection: socket.socket, vocabulary: Vocabulary) -> None:
    """Read a grammar, compile it and walk through it, and say how that went."""
    connection.sendall(HERE)
    bound_this_process()
    grammar = msgspec.json.decode(read_all(connection), type=Grammar)
    verdict = Verdict()
    try:
        constraint = compile_grammar(grammar, vocabulary)
        probe(grammar, constraint, PROBE_STEPS)
    except InvalidRequestError as error:
        verdict = as_verdict(error)
    except Exception as error:  # the library's own failure on this grammar, MemoryError included
        verdict = as_verdict(invalid(grammar, f"it cannot be compiled: {error!r}"))
    connection.sendall(msgspec.json.encode(verdict))


def bound_this_process() -> None:
    """From here on too much time or memory ends this process."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)


def as_verdict(error: MinisglError) -> Verdict:
    """An error as it travels."""
    unsupported = isinstance(error, UnsupportedParameterError)
    return Verdict(error=error.message, param=error.param, unsupported=unsupported)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side is done."""
    parts = []
    while part := connection.recv(CHUNK):
        parts.append(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
