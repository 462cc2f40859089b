"""The other ranks of a group as rank 0 sees them: a socket to each, word from all, and notice when one is gone."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from minisgl.distributed.messages import Close, FromRank, Hello, RankFailed, ToRank, encoder, from_rank_decoder
from minisgl.errors import ConfigError, EngineDeadError, MinisglError

RANK_COMMAND = (sys.executable, "-m", "minisgl.distributed.worker")
POLL_MS = 100
LAST_WORDS_MS = 300
"""How long the last message of a rank whose connection ended is waited for."""
BLAME_SECONDS = 2.0
"""How long after an error in a collective a rank that may have caused it is looked for."""
STOP_SECONDS = 5.0
HEARTBEAT_MS = 2000
SILENCE_MS = 15_000
"""A host that says nothing for so long is gone; between processes of one host the kernel says so at once."""

MAX_FOLDER = 70
"""Characters; the path of a Unix socket has at most 107."""

log = logging.getLogger(__name__)


class RankStart(msgspec.Struct, frozen=True):
    """The line on the stdin of a rank that was started here; its end means that rank 0 is gone.

    `folder` holds what they met by: who is left behind removes it.
    """

    rank: int
    size: int
    device: str
    rendezvous: str
    plans: str
    word: str
    folder: str


class Members:
    """Ranks 1 to size - 1. One thread of rank 0 sends and asks; a thread of its own listens.

    What `when_gone` was given is called from that thread, once, when a rank is gone that should not be. `address` is a
    ZeroMQ endpoint that ends with "*", which stands for something different for each socket.
    """

    def __init__(self, size: int, address: str) -> None:
        self.size = size
        self._when_gone: list[Callable[[], None]] = []
        self._context = zmq.Context()
        self._encoder = encoder()
        self._outboxes = [self._bind(zmq.PUSH, address, f"plans-{rank}") for rank in range(1, size)]
        self._word = self._bind(zmq.PULL, address, "word")
        self._monitors = [box.get_monitor_socket(zmq.EVENT_DISCONNECTED) for box in self._outboxes]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: Path | None = None
        self._arrived: set[int] = set()
        self._failure: MinisglError | None = None
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="minisgl-ranks", daemon=True)
        self._listener.start()

    def _bind(self, kind: int, address: str, name: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        if address.startswith("tcp"):
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        socket.bind(address if address.startswith("tcp") else address.removesuffix("*") + name)
        return socket

    @classmethod
    def start(cls, size: int, device: str) -> tuple[Members, str]:
        """Start the other ranks as processes of this host; also where to meet them, for `join_group`.

        The sockets lie in a folder that only this user can enter. `device` is "cpu" or "cuda".
        """
        base = tempfile.gettempdir()
        folder = Path(tempfile.mkdtemp(prefix="minisgl-ranks-", dir=base if len(base) <= MAX_FOLDER else "/tmp"))
        members = cls(size, f"ipc://{folder}/*")
        members._folder = folder
        rendezvous = f"file://{folder}/meeting"
        try:
            for rank, plans in enumerate(members.addresses[:-1], start=1):
                line = RankStart(
                    rank=rank,
                    size=size,
                    device=device if device == "cpu" else f"{device}:{rank}",
                    rendezvous=rendezvous,
                    plans=plans,
                    word=members.addresses[-1],
                    folder=str(folder),
                )
                process = subprocess.Popen(RANK_COMMAND, stdin=subprocess.PIPE, bufsize=0, start_new_session=True)
                members._processes.append(process)
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended: `wait` says how
                    process.stdin.write(msgspec.json.encode(line) + b"\n")
            members.wait()
        except BaseException:
            members.close(at_once=True)
            raise
        return members, rendezvous

    @property
    def addresses(self) -> list[str]:
        """Where each of the other ranks hears from this one, and last where this one hears from all."""
        return [box.getsockopt_string(zmq.LAST_ENDPOINT) for box in (*self._outboxes, self._word)]

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Have this called when a rank is gone; at once, if one is."""
        with self._changed:
            if self._failure is None:
                self._when_gone.append(callback)
                return
        callback()

    def wait(self) -> None:
        """Return when every rank has said hello. Raises what `check` does, and when a process ended before."""
        with self._changed:
            while len(self._arrived) < self.size - 1:
                self._changed.wait(POLL_MS / 1000)
                self.check()
                for rank, process in enumerate(self._processes, start=1):
                    if rank not in self._arrived and process.poll() is not None:
                        raise EngineDeadError(
                            f"rank {rank} of {self.size} ended with {process.returncode} at its start"
                        )

    def send(self, message: ToRank) -> None:
        """Say something to every rank; returns at once."""
        data = self._encoder.encode(message)
        for box in self._outboxes:
            box.send(data)

    @property
    def broken(self) -> bool:
        """Whether a rank is gone."""
        return self._failure is not None

    def check(self) -> None:
        """Raise EngineDeadError, or ConfigError with what a rank cannot honour, when one is gone."""
        if self._failure is not None:
            raise self._failure

    def blame(self, error: Exception) -> Exception:
        """The error that a rank's end explains, or the one given: ours, or one that they all were there to see."""
        if isinstance(error, MinisglError):
            return error
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, BLAME_SECONDS)
            return error if self._failure is None else self._failure

    def close(self, at_once: bool = False) -> None:
        """Let the ranks finish and go; what does not go, or `at_once` everything, is ended."""
        if self._closing.is_set():
            return
        self._closing.set()
        at_once = at_once or self._failure is not None
        if not at_once:
            self.send(Close())
        deadline = time.monotonic() + (0 if at_once else STOP_SECONDS)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self._remove_folder()  # first: the process may have little time left
        self._listener.join()
        for box in self._outboxes:
            box.disable_monitor()
        self._context.destroy(linger=0 if self._processes or at_once else int(STOP_SECONDS * 1000))

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self) -> None:
        poller = zmq.Poller()
        decoder = from_rank_decoder()
        for socket in (self._word, *self._monitors):
            poller.register(socket, zmq.POLLIN)
        while not self._closing.is_set():
            ready = dict(poller.poll(POLL_MS))
            if self._word in ready:
                self._hear(decoder.decode(self._word.recv()))
            for rank, monitor in enumerate(self._monitors, start=1):
                if monitor in ready:
                    self._lose(rank)

    def _hear(self, message: FromRank) -> None:
        match message:
            case Hello(rank):
                with self._changed:
                    self._arrived.add(rank)
                    self._changed.notify_all()
            case RankFailed(rank, error, asked):
                if not asked and (cause := self._lost_beside(rank)):
                    self._lose(cause)
                kind = ConfigError if asked else EngineDeadError
                self._fail(kind(f"rank {rank} of {self.size}: {error}"))

    def _lost_beside(self, rank: int) -> int | None:
        """Another rank whose connection has ended or soon does: what this one failed of is that it is gone."""
        others = {monitor: other for other, monitor in enumerate(self._monitors, start=1) if other != rank}
        if not others:
            return None
        poller = zmq.Poller()
        for monitor in others:
            poller.register(monitor, zmq.POLLIN)
        return next((others[monitor] for monitor, _ in poller.poll(LAST_WORDS_MS)), None)

    def _lose(self, rank: int) -> None:
        """A rank's connection ended. Its last words say why; those of others only say that it is gone."""
        if self._monitors[rank - 1].poll(0):
            recv_monitor_message(self._monitors[rank - 1])
        decoder = from_rank_decoder()
        while self._word.poll(LAST_WORDS_MS):
            message = decoder.decode(self._word.recv())
            if isinstance(message, RankFailed) and message.rank == rank:
                self._hear(message)
        self._fail(EngineDeadError(f"rank {rank} of {self.size} ended; nothing can be generated any more"))

    def _fail(self, failure: MinisglError) -> None:
        """A rank is gone: end the others, which may wait for it in a collective for ever, and let everybody know.

        That comes last: who knows may end this process at once.
        """
        if self._closing.is_set() or self._failure is not None:
            return
        log.error("%s", failure.message)
        for process in self._processes:
            process.kill()
        self._remove_folder()
        with self._changed:
            self._failure = failure
            callbacks = list(self._when_gone)
            self._changed.notify_all()
        for callback in callbacks:
            callback()
