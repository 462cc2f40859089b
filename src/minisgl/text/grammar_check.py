"""Grammars for one model: checked by the API process in bounded time, followed by the engine.

A check runs in a helper process, in a forked child of its own for each grammar, which the kernel ends when its time or
memory is used up: llguidance's limits do not bound what it does with a large `multipleOf` (35 s and 2 GB). The helper
is `python -m minisgl.text.grammar_check FOLDER VOCAB_SIZE EOS...`, its standard input a socket. It loads the
vocabulary once and then receives a connection for each grammar through the socket (SCM_RIGHTS) until the socket ends.
A child sends `STARTED` on its connection, then its `Verdict`, or it dies.
"""

import contextlib
import functools
import hashlib
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec

from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError, MinisglError, UnsupportedParameterError
from minisgl.system import Helper, limit_memory
from minisgl.text.grammar import MatcherConstraint, Vocabulary, check_size, compile_grammar, invalid, probe

CPU_SECONDS = 1.0
WALL_SECONDS = 1.7
PROBE_STEPS = 32
STARTED = b"+"
ANSWER_SECONDS = 60.0  # for a verdict: the vocabulary may have to be loaded, and the machine be too busy to end a child
MAX_CHECKED = 4096  # grammars remembered as good, by their digest
MAX_COMPILED = 32  # a hostile one holds up to some 100 MB


class HelperError(MinisglError, status=503, code="grammar_helper_unavailable"):
    """The helper process cannot be started or was killed."""


# Why a grammar cannot be followed: the name of an error's class, its message and its `param`.
Verdict = tuple[str, str, str | None] | None
BY_USERS = {kind.__name__: kind for kind in (InvalidRequestError, UnsupportedParameterError)}


def read_all(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        return file.read()


def main() -> None:
    control = socket.socket(fileno=0)
    folder, vocab_size, *eos = sys.argv[1:]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Threads there may be are numpy's; they idle, and the children use none.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    failure: MinisglError | None = None
    try:
        vocabulary = Vocabulary(Path(folder), int(vocab_size), [int(token) for token in eos])
    except MinisglError as error:
        failure = error
    while fds := socket.recv_fds(control, 1, 1)[1]:
        with socket.socket(fileno=fds[0]) as connection:
            if os.fork() == 0:
                control.close()
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(STARTED)
                    limit_memory()
                    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
                    source = read_all(connection)
                    found = failure or judge(source, vocabulary)
                    verdict = None if found is None else (type(found).__name__, found.message, found.param)
                    connection.sendall(msgspec.json.encode(verdict))
                os._exit(0)


def judge(source: bytes, vocabulary: Vocabulary) -> MinisglError | None:
    grammar = msgspec.json.decode(source, type=Grammar)
    try:
        probe(grammar, compile_grammar(grammar, vocabulary), PROBE_STEPS)
    except InvalidRequestError as error:
        return error
    except Exception as error:  # the library's own failure on this grammar, MemoryError included
        return invalid(grammar, f"it cannot be compiled: {error!r}")
    return None


class GrammarChecker:
    """Tries grammars in a helper process, started when it is needed and when it died. Several threads may use it."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._arguments = [str(value) for value in (folder, vocab_size, *eos_token_ids)]
        self._lock = threading.Lock()
        self._helper: Helper | None = None
        self._checked: set[bytes] = set()

    def checker(self, grammar: Grammar) -> Callable[[], None] | None:
        """What raises InvalidRequestError for a grammar that is invalid, unsupported or too expensive, in the helper
        process, and HelperError without one; None for one that was found good before. Raises for one that is too large.
        """
        check_size(grammar)
        digest = hashlib.sha256(msgspec.json.encode(grammar)).digest()

        def check() -> None:
            reply = self._ask(grammar) or self._ask(grammar)  # without a reply the helper had died; the next is new
            if not reply:
                raise HelperError("the process that checks grammars died or does not answer")
            if reply == STARTED:
                raise invalid(grammar, "it takes too much time or memory")
            if verdict := msgspec.json.decode(reply.removeprefix(STARTED), type=Verdict):
                name, message, param = verdict
                raise BY_USERS.get(name, HelperError)(message, param=param)
            if len(self._checked) >= MAX_CHECKED:
                self._checked.clear()
            self._checked.add(digest)

        return None if digest in self._checked else check

    def _ask(self, grammar: Grammar) -> bytes:
        """What the child said; empty when there was none: the helper is replaced the next time."""
        with self._lock:
            if self._helper is None or not self._helper.end.alive:
                self._helper = Helper("minisgl.text.grammar_check", *self._arguments)
            helper = self._helper
        ours, theirs = socket.socketpair()
        ours.settimeout(ANSWER_SECONDS)
        reply = b""
        with ours, contextlib.suppress(OSError):  # it has ended, or does not answer in time
            with theirs:
                socket.send_fds(helper.link, [b"g"], [theirs.fileno()])
            ours.sendall(msgspec.json.encode(grammar))
            ours.shutdown(socket.SHUT_WR)
            reply = read_all(ours)
        if not reply:
            helper.end()
        return reply


class GrammarCompiler:
    """Makes constraints for one model. Nothing is loaded before the first use. Safe to use from several threads."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._lock = threading.Lock()
        self._vocabulary = functools.cache(functools.partial(Vocabulary, folder, vocab_size, eos_token_ids))
        self._compiled = functools.lru_cache(MAX_COMPILED)(self._compile)

    def constraint(self, grammar: Grammar) -> MatcherConstraint:
        return self._compiled(grammar).copy()

    def _compile(self, grammar: Grammar) -> MatcherConstraint:
        with self._lock:  # loaded once
            vocabulary = self._vocabulary()
        return compile_grammar(grammar, vocabulary)


if __name__ == "__main__":
    main()
