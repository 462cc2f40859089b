"""The other end of the helper process: a grammar's verdict within seconds, whatever the grammar does."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import msgspec

from minisgl.errors import InvalidRequestError, MinisglError, UnsupportedParameterError
from minisgl.grammar.helper import HERE, WALL_SECONDS, Verdict, read_all
from minisgl.grammar.source import invalid
from minisgl.grammar.vocabulary import VocabularySource
from minisgl.types import Grammar

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
        command = [sys.executable, "-m", "minisgl.grammar.helper", str(theirs.fileno())]
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
