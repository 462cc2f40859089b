"""The workers of a group as rank 0 sees them: a link to each, and notice when one is gone."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait

from minisgl.distributed import messages
from minisgl.distributed.collectives import TPGroup, broadcast_text
from minisgl.distributed.messages import ShutdownWorker, ToWorker
from minisgl.errors import ConfigError, EngineDeadError, MinisglError
from minisgl.system import open_standard_streams

WORKER_COMMAND = (sys.executable, "-m", "minisgl.distributed.worker")
STATUS_SECONDS = 0.1  # for the exit status of a worker whose link ended
CAUSE_SECONDS = 2.0  # after an error in a collective, for news of a worker that may have caused it
OTHER_CAUSE_SECONDS = 0.3  # after a worker's report, for the end of another, of which it may be a consequence
STOP_SECONDS = 5.0

log = logging.getLogger(__name__)


class WorkerPool:
    """Ranks 1 to size - 1. Used by one thread of rank 0; a thread of its own listens to each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._links: list[socket.socket] = []
        self._listeners: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failure: Future[MinisglError] = Future()  # of the first worker that is gone
        self._closing = False
        self._lock = threading.Lock()  # of the two above

    def start(self, device: str) -> str:
        """Start workers as processes of this host, on "cpu" or "cuda", and wait until they run. Returns where the ranks
        find each other: a file without a name, which they inherit.
        """
        open_standard_streams()  # a worker's own would take the places of what it inherits
        file = os.memfd_create("rendezvous")
        weakref.finalize(self, os.close, file).atexit = False  # the group opens it again until it ends
        rendezvous = f"file:///proc/self/fd/{file}"
        links: list[socket.socket] = []
        for rank in range(1, self.size):
            own = device if device == "cpu" else f"cuda:{rank}"
            link, theirs = socket.socketpair()
            with theirs:
                inherited = [file, theirs.fileno()]
                command = [*WORKER_COMMAND, str(rank), str(self.size), own, rendezvous, str(theirs.fileno())]
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=inherited
                )
            self._processes.append(process)
            links.append(link)
        for rank, link in enumerate(links, start=1):
            self.listen(rank, link)
        return rendezvous

    def accept(self, group: TPGroup) -> None:
        """Have workers that a launcher started, and that are in the group, connect; wait until they run."""
        # On every interface only where other ranks are on other hosts.
        host = "127.0.0.1" if group.one_host else ""
        servers = [socket.create_server((host, 0)) for _ in range(1, self.size)]
        broadcast_text(group, " ".join(str(server.getsockname()[1]) for server in servers))
        for rank, server in enumerate(servers, start=1):
            with server:
                link, _ = server.accept()
            messages.notice_silence(link)
            self.listen(rank, link)

    @property
    def broken(self) -> bool:
        return self._failure.done()

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Have this called, once and from another thread, when a worker is gone; now, if one is already."""
        self._failure.add_done_callback(lambda _: callback())

    def send(self, message: ToWorker) -> None:
        data = messages.frame(message)
        for link in self._links:
            with contextlib.suppress(OSError):  # its worker is gone, which its listener tells
                link.sendall(data)

    def check(self) -> None:
        """Raise EngineDeadError when a worker is gone, or ConfigError with what it could not honour."""
        if self.broken:
            raise self._failure.result()

    @contextlib.contextmanager
    def name_the_cause(self) -> Iterator[None]:
        """Raise a worker's failure in place of an error of this rank that follows from it."""
        try:
            yield
        except MinisglError:
            raise
        except Exception as error:
            wait([self._failure], CAUSE_SECONDS)
            if self.broken:
                raise self._failure.result() from error
            raise

    def close(self, force: bool = False) -> None:
        """Let the workers finish and end; kill those that do not end in time, or all of them, by `force`."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        if not (force or self.broken):
            self.send(ShutdownWorker())
            deadline = time.monotonic() + STOP_SECONDS
            for listener in self._listeners:  # until its worker has ended
                listener.join(max(0.0, deadline - time.monotonic()))
        self._abandon()
        for process in self._processes:
            process.wait()
        for listener, link in zip(self._listeners, self._links, strict=True):
            listener.join()
            link.close()

    def listen(self, rank: int, link: socket.socket) -> None:
        """Wait until the worker at the other end of a link runs; then take in what it reports, in a thread. Raises
        EngineDeadError when it has ended.
        """
        started = b""
        with contextlib.suppress(OSError):  # of one whose host or process is gone, which its thread tells
            started = link.recv(len(messages.STARTED))
        self._links.append(link)
        listener = threading.Thread(target=self._listen, args=(rank, link), daemon=True)
        self._listeners.append(listener)
        listener.start()
        if not started:
            listener.join()
            self.check()

    def _listen(self, rank: int, link: socket.socket) -> None:
        failure: MinisglError | None = None
        with link.makefile("rb") as reports:
            while (report := messages.receive(reports, messages.FROM_WORKER)) is not None:
                kind = ConfigError if report.user_error else EngineDeadError
                failure = kind(f"rank {rank} of {self.size}: {report.error}")
                if report.user_error:
                    break
                # The error may only say that another worker is gone, which is then the cause.
                link.settimeout(OTHER_CAUSE_SECONDS)
        if failure is None:
            ended = f"rank {rank} of {self.size} ended"
            if self._processes:  # started here
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ended += f" with {self._processes[rank - 1].wait(STATUS_SECONDS)}"
            failure = EngineDeadError(f"{ended}; nothing can be generated any more")
        self._fail(failure)

    def _fail(self, failure: MinisglError) -> None:
        """End the other workers, which may wait in a collective for ever; then tell, which may end this process."""
        with self._lock:
            if self._closing or self.broken or self._failure.running():
                return
            self._failure.set_running_or_notify_cancel()  # so that only the first one is told
            log.error("%s", failure.message)
            self._abandon()
        self._failure.set_result(failure)

    def _abandon(self) -> None:
        """Kill the workers; those of other hosts end with their links."""
        for process in self._processes:
            process.kill()
        for link in self._links:
            with contextlib.suppress(OSError):  # it has ended
                link.shutdown(socket.SHUT_RDWR)
