"""A process that tries grammars out, each in a child of its own that ends when its time or memory is used up.

It is `python -m minisgl.text.grammar_check FD SOURCE`: a socket, and a `VocabularySource` as JSON. It loads the
vocabulary once, says so with a `Verdict`, and then takes a connection for each grammar through the socket
(SCM_RIGHTS), whose end
ends it.
The child says on its connection that it is there (`HERE`), then its `Verdict`, or it dies: the kernel's timers and
limits bound also what library code does without ever coming back to Python.

The other end of the helper process: a grammar's verdict within seconds, whatever the grammar does.

Grammars for one model: checked at the door, followed in the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec

from minisgl.core.types import Grammar, ModelInfo
from minisgl.errors import InvalidRequestError, MinisglError, UnsupportedParameterError
from minisgl.text.grammar import (
    MatcherConstraint,
    Vocabulary,
    VocabularySource,
    check_size,
    compile_grammar,
    invalid,
    probe,
)

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


START_SECONDS = 60.0
"""What the helper may take to load the vocabulary."""
GRACE_SECONDS = 5.0
"""How long an answer is waited for after the child's own limit, on a machine too busy to end it in time."""
AT_ONCE = 4


class HelperError(MinisglError):
    """The helper process cannot be started or was killed."""

    status = 503
    code = "grammar_helper_unavailable"


class Guard:
    """Starts the helper when it is first needed, and again when it died. Safe to use from several threads."""

    def __init__(self, source: VocabularySource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def judge(self, grammar: Grammar) -> None:
        """Raise InvalidRequestError when a grammar cannot be followed, or not in time; HelperError for our faults."""
        with self._slots:
            reply = self._ask(grammar)
            if not reply.startswith(HERE):  # the helper had died; the next one is new
                reply = self._ask(grammar)
        if not reply.startswith(HERE):
            raise HelperError("the process that checks grammars died")
        if reply == HERE:
            raise invalid(grammar, "it takes too much time or memory")
        raise_verdict(msgspec.json.decode(reply.removeprefix(HERE), type=Verdict))

    def close(self) -> None:
        """End the helper."""
        with self._lock:
            self._stop()

    def _ask(self, grammar: Grammar) -> bytes:
        """What the child said. Without HERE there was no child, and the helper is replaced the next time."""
        with self._lock:
            helper = self._started()
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(WALL_SECONDS + GRACE_SECONDS)
            try:
                with theirs:
                    socket.send_fds(helper, [b"g"], [theirs.fileno()])
                ours.sendall(msgspec.json.encode(grammar))
                ours.shutdown(socket.SHUT_WR)
                reply = read_all(ours)
            except TimeoutError:
                self._replace(helper)
                raise HelperError("the process that checks grammars does not answer") from None
            except OSError:  # broken or reset; closed by another thread that found it broken
                reply = b""
        if not reply.startswith(HERE):
            self._replace(helper)
        return reply

    def _replace(self, helper: socket.socket) -> None:
        """End the helper behind a socket, if it is not another one by now."""
        with self._lock:
            if self._control is helper:
                self._stop()

    def _started(self) -> socket.socket:
        """The helper's socket; whoever calls holds the lock."""
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self._stop()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "minisgl.text.grammar_check", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [*command, msgspec.json.encode(self._source).decode()],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._control = ours
        ours.settimeout(START_SECONDS)
        try:
            reply = ours.recv(1 << 16)
        except TimeoutError:
            reply = b""
        if not reply:
            self._stop()
            raise HelperError("the process that checks grammars did not start")
        ours.settimeout(None)
        verdict = msgspec.json.decode(reply, type=Verdict)
        if verdict.error is not None and not verdict.unsupported:
            raise HelperError(verdict.error)
        raise_verdict(verdict)
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def raise_verdict(verdict: Verdict) -> None:
    """Raise the error that a verdict carries, if it does."""
    if verdict.error is not None:
        kind = UnsupportedParameterError if verdict.unsupported else InvalidRequestError
        raise kind(verdict.error, param=verdict.param)


MAX_CHECKED = 4096
"""Grammars that are remembered as good, by their digest."""
MAX_COMPILED = 32
"""Grammars that are kept compiled; a hostile one holds up to some 100 MB."""


class GrammarCompiler:
    """What a model can be held to. Nothing is loaded before the first use. Safe to use from several threads.

    `folder` holds the tokenizer; `vocab_size` is the width of the logits.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._source = VocabularySource(folder=str(folder), vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._guard = Guard(self._source)
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._checked: OrderedDict[bytes, None] = OrderedDict()
        self._compiled: OrderedDict[Grammar, MatcherConstraint] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Raise InvalidRequestError for a grammar that is invalid, unsupported or too expensive.

        It is compiled and tried out in a process of its own, with `helper.WALL_SECONDS` to live. HelperError (503) says
        that there is no such process. For the API process.
        """
        check_size(grammar)
        digest = hashlib.sha256(msgspec.json.encode(grammar)).digest()
        with self._lock:
            if digest in self._checked:
                self._checked.move_to_end(digest)
                return
        self._guard.judge(grammar)
        with self._lock:
            self._checked[digest] = None
            if len(self._checked) > MAX_CHECKED:
                self._checked.popitem(last=False)

    def constraint(self, grammar: Grammar) -> MatcherConstraint:
        """A constraint at the start of its text. Raises InvalidRequestError. For the engine process.

        It compiles in this process, with the library's limits alone: a grammar that nobody checked may take seconds.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._source)
            if (found := self._compiled.get(grammar)) is None:
                found = self._compiled[grammar] = compile_grammar(grammar, self._vocabulary)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.copy()

    def close(self) -> None:
        """End the process that checks, if it was started."""
        self._guard.close()


def build_constraints(folder: Path, model: ModelInfo) -> Callable[[Grammar], MatcherConstraint]:
    """What makes an engine's constraints for a model; the tokenizer is loaded with the first one."""
    return GrammarCompiler(folder, model.vocab_size, model.eos_token_ids).constraint
