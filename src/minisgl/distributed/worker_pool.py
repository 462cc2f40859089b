"""The workers of a group as rank 0 sees them: a socket to each, one from all, and notice when one is gone."""

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from minisgl.distributed import messages
from minisgl.distributed.messages import FromWorker, ShutdownWorker, ToWorker, WorkerFailed, WorkerStarted
from minisgl.errors import ConfigError, EngineDeadError, MinisglError
from minisgl.system import PrivateFolder

WORKER_COMMAND = (sys.executable, "-m", "minisgl.distributed.worker")
POLL_MS = 100
LAST_REPORT_MS = 300  # for the last report of a worker whose connection ended
CAUSE_SECONDS = 2.0  # after an error in a collective, for news of a worker that may have caused it
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class WorkerPool:
    """Ranks 1 to size - 1. Used by one thread of rank 0; a thread of its own listens.

    `address` is a ZeroMQ endpoint that ends with "*", in place of which each socket has a name or port of its own.
    `folder`, of the workers that `start` started, holds the sockets plans-RANK and reports, and the rendezvous.
    """

    def __init__(self, size: int, address: str) -> None:
        self.size = size
        self.folder: Path | None = None
        self._remove_folder: Callable[[], None] = lambda: None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._plans = [self._bind(zmq.PUSH, address, f"plans-{rank}") for rank in range(1, size)]
        self._reports = self._bind(zmq.PULL, address, "reports")
        self._monitors = [socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) for socket in self._plans]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._on_failure: list[Callable[[], None]] = []
        self._started: set[int] = set()
        self._failure: MinisglError | None = None
        self._changed = threading.Condition()  # of the three above
        self._closing = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="minisgl-workers", daemon=True)
        self._listener.start()

    def _bind(self, kind: int, address: str, name: str) -> zmq.Socket[bytes]:
        socket = messages.make_socket(self._context, kind, address, linger_ms=0)
        socket.bind(address if address.startswith("tcp") else address.removesuffix("*") + name)
        return socket

    @classmethod
    def start(cls, size: int, device: str) -> "WorkerPool":
        """Start workers as processes of this host, and wait until they run. `device`: "cpu" or "cuda".

        The sockets lie in a folder that only this user can enter. A worker's stdin ends when this process does.
        """
        private = PrivateFolder("minisgl-ranks-")
        folder = Path(private.name)
        pool = cls(size, f"ipc://{folder}/*")
        pool.folder, pool._remove_folder = folder, private.cleanup
        try:
            for rank in range(1, size):
                own = device if device == "cpu" else f"cuda:{rank}"
                command = [*WORKER_COMMAND, str(rank), str(size), own, str(folder)]
                pool._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
            pool.wait_until_started()
        except BaseException:
            pool.close(force=True)
            raise
        return pool

    @property
    def addresses(self) -> list[str]:
        """The endpoints from which the workers receive, in the order of ranks, and last the one that they report to."""
        return [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (*self._plans, self._reports)]

    @property
    def broken(self) -> bool:
        return self._failure is not None

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Have this called, once and from the listener's thread, when a worker is gone; now, if one is already."""
        with self._changed:
            if self._failure is None:
                self._on_failure.append(callback)
                return
        callback()

    def wait_until_started(self) -> None:
        """Return when every worker runs. Raises what `check` does, and when a process ended before."""
        with self._changed:
            while len(self._started) < self.size - 1:
                self._changed.wait(POLL_MS / 1000)
                self.check()
                for rank, process in enumerate(self._processes, start=1):
                    if rank not in self._started and (status := process.poll()) is not None:
                        raise EngineDeadError(f"rank {rank} of {self.size} ended with {status} at its start")

    def send(self, message: ToWorker) -> None:
        data = messages.ENCODER.encode(message)
        for socket in self._plans:
            while True:
                try:
                    socket.send(data, zmq.NOBLOCK)
                    break
                except zmq.Again:  # its worker is gone, or was slow to connect
                    self.check()
                    socket.poll(POLL_MS, zmq.POLLOUT)

    def check(self) -> None:
        """Raise EngineDeadError when a worker is gone, or ConfigError with what it could not honour."""
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def name_the_cause(self) -> Iterator[None]:
        """Raise a worker's failure in place of an error of this rank that follows from it."""
        try:
            yield
        except MinisglError:
            raise
        except Exception as error:
            with self._changed:
                self._changed.wait_for(lambda: self.broken, CAUSE_SECONDS)
            if self._failure is not None:
                raise self._failure from error
            raise

    def close(self, force: bool = False) -> None:
        """Let the workers finish and end; kill those that do not end in time, or all of them, by `force`."""
        if self._closing.is_set():
            return
        self._closing.set()
        force = force or self.broken
        if not force:
            self.send(ShutdownWorker())
        deadline = time.monotonic() + (0 if force else STOP_SECONDS)
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
        self._remove_folder()  # first, as this process may be about to be killed
        self._listener.join()
        for socket in self._plans:
            socket.disable_monitor()
        self._context.destroy(linger=0 if self._processes or force else int(STOP_SECONDS * 1000))

    def _listen(self) -> None:
        while not self._closing.is_set():
            ready, _, _ = zmq.select([self._reports, *self._monitors], [], [], POLL_MS / 1000)
            if self._reports in ready:
                self._handle(messages.FROM_WORKER.decode(self._reports.recv()))
            for rank, monitor in enumerate(self._monitors, start=1):
                if monitor in ready:
                    self._disconnected(rank)

    def _handle(self, message: FromWorker) -> None:
        match message:
            case WorkerStarted(rank):
                with self._changed:
                    self._started.add(rank)
                    self._changed.notify_all()
            case WorkerFailed(rank, error, user_error):
                # Unless it is the user's, the error may only say that another worker is gone, which is then the cause.
                cause = None if user_error else self._disconnected_beside(rank)
                if cause is not None:
                    self._disconnected(cause)
                kind = ConfigError if user_error else EngineDeadError
                self._fail(kind(f"rank {rank} of {self.size}: {error}"))

    def _disconnected_beside(self, rank: int) -> int | None:
        """Another worker whose connection has ended, or does within LAST_REPORT_MS."""
        others = [monitor for other, monitor in enumerate(self._monitors, start=1) if other != rank]
        ended = zmq.select(others, [], [], LAST_REPORT_MS / 1000)[0] if others else []
        return self._monitors.index(ended[0]) + 1 if ended else None

    def _disconnected(self, rank: int) -> None:
        """A worker's connection ended: its last report says why. Reports of others are consequences and are dropped."""
        if self._monitors[rank - 1].poll(0):
            recv_monitor_message(self._monitors[rank - 1])
        while self._reports.poll(LAST_REPORT_MS):
            message = messages.FROM_WORKER.decode(self._reports.recv())
            if isinstance(message, WorkerFailed) and message.rank == rank:
                self._handle(message)
        self._fail(EngineDeadError(f"rank {rank} of {self.size} ended; nothing can be generated any more"))

    def _fail(self, failure: MinisglError) -> None:
        """Kill the other workers, which may wait in a collective for ever; then tell, which may end this process."""
        if self._closing.is_set() or self._failure is not None:
            return
        log.error("%s", failure.message)
        for process in self._processes:
            process.kill()
        self._remove_folder()
        with self._changed:
            self._failure = failure
            callbacks = list(self._on_failure)
            self._changed.notify_all()
        for callback in callbacks:
            callback()
