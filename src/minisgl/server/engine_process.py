"""The engine process: the engine behind sockets. Stdin begins with an `ipc.EngineSetup`; its end ends the engine."""

import contextlib
import dataclasses
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from minisgl.build import build_engine
from minisgl.config import kv_events
from minisgl.core.engine import Engine
from minisgl.core.request_state import Constraint, make_constraint
from minisgl.core.types import FinishReason, Request, TokenEvent
from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server import ipc
from minisgl.server.debug import StepLog, snapshot
from minisgl.server.kv_events import KVEventPublisher

IDLE_POLL_MS = 200
SHORT_SLEEP = 2e-4  # s; what a poll in whole milliseconds cannot wait for
COMPILERS = 2  # threads, so that a known grammar need not wait for a slow one
COMPILING_POLL_MS = 2  # while there is nothing to compute but grammars are being compiled
READ_BYTES = 2**18
LINGER_SECONDS = 1.0  # for the last messages to leave when the engine ends, and for the first one to find a link
GRACE_SECONDS = 1.5  # for a step that runs when the launcher or a rank is gone


@dataclasses.dataclass
class Link:
    socket: socket.socket
    unread: bytearray  # the beginning of a message
    unsent: bytearray


class Links:
    """The engine's ends of all links, named by their descriptors. Nothing here waits: what a process does not read is
    kept, and what is sent to one that is gone is dropped.
    """

    def __init__(self, folder: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(ipc.address(folder))
        self._listener.listen()
        self._listener.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)
        self._links: dict[int, Link] = {}
        self._owners: dict[str, int] = {}  # the link of each live request
        self._first: ipc.FromEngine | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ipc.ToEngine)

    def receive(self, milliseconds: int = 0) -> list[tuple[int, ipc.ToEngine]]:
        """What has come by which link, waiting so long for the first; the end of one aborts its requests."""
        received: list[tuple[int, ipc.ToEngine]] = []
        for link, events in self._poll.poll(milliseconds):
            if link not in self._links:
                self._accept()
                continue
            if events & select.POLLOUT:
                self._flush(link)
            if events == select.POLLOUT:
                continue
            data, unread = b"", self._links[link].unread
            with contextlib.suppress(OSError):  # of one whose process is gone
                data = self._links[link].socket.recv(READ_BYTES)
            if not data:
                self._poll.unregister(link)
                self._links.pop(link).socket.close()
                received.append((link, ipc.Abort([name for name, owner in self._owners.items() if owner == link])))
                self._owners = {name: owner for name, owner in self._owners.items() if owner != link}
            unread += data
            for message in map(self._decoder.decode, ipc.cut(unread)):
                if isinstance(message, ipc.Add):
                    self._owners[message.request.id] = link
                received.append((link, message))
        return received

    def send(self, message: ipc.FromEngine, link: int) -> None:
        if link in self._links:
            self._links[link].unsent += ipc.frame(self._encoder.encode(message))
            self._flush(link)

    def send_first(self, message: ipc.FromEngine) -> None:
        """Tell all links, and those that are still to come before anything else."""
        self._first = message
        for link in self._links:
            self.send(message, link)
        if not self._links:
            self._poll.poll(1000 * LINGER_SECONDS)  # the launcher may not be here yet
        self._accept()

    def send_events(self, events: list[TokenEvent]) -> None:
        owners = self._owners
        shares: dict[int, list[TokenEvent]] = {}
        for event in events:
            link = owners.get(event.id) if event.finish is None else owners.pop(event.id, None)
            if link is not None:
                shares.setdefault(link, []).append(event)
        for link, share in shares.items():
            self.send(ipc.Events(share), link)

    def close(self) -> None:
        self._listener.close()
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.socket.settimeout(LINGER_SECONDS)
                link.socket.sendall(link.unsent)
            link.socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._first is not None:
                connection = self._listener.accept()[0]
                connection.setblocking(False)
                self._links[connection.fileno()] = Link(connection, bytearray(), bytearray())
                self._poll.register(connection, select.POLLIN)
                self.send(self._first, connection.fileno())

    def _flush(self, link: int) -> None:
        unsent = self._links[link].unsent
        with contextlib.suppress(OSError):  # it is full; or the process is gone, which reading tells
            del unsent[: self._links[link].socket.send(unsent)]
        self._poll.modify(link, select.POLLIN | select.POLLOUT if unsent else select.POLLIN)


class EngineServer:
    """Moves messages in, steps the engine, moves events out, in one thread, until `parent_gone`."""

    engine: Engine
    kv_events: KVEventPublisher | None = None

    def __init__(self, setup: ipc.EngineSetup, parent_gone: threading.Event) -> None:
        self.config, self.parent_gone = setup.config, parent_gone
        self.links = Links(setup.folder)
        self.steps = StepLog()
        self.compilers = ThreadPoolExecutor(COMPILERS, "minisgl-grammar")
        self.compiling: dict[str, tuple[Request, Future[Constraint]]] = {}  # requests that wait for their grammars

    def run(self) -> int:
        try:
            if (said := kv_events(self.config)) is not None:
                self.kv_events = KVEventPublisher(said, self.config.page_size)
            built = build_engine(self.config, progress=sys.stderr.isatty(), on_failure=leave_soon)
            self.engine = built.engine
            if self.kv_events is not None:
                self.engine.cache.tree.listener = self.kv_events
            if self.config.debug_endpoints:
                self.engine.observers.append(self.steps)
            self.links.send_first(ipc.Ready(built.engine.model, str(built.folder), list(built.notes)))
            self._serve()
        except MinisglError as error:
            self.links.send_first(ipc.Failed(error.message))
            return 1
        except Exception as error:
            self.links.send_first(ipc.Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.compilers.shutdown(wait=False, cancel_futures=True)
            self.links.close()
            if self.kv_events is not None:
                self.kv_events.close()
        return 0

    def _serve(self) -> None:
        engine = self.engine
        while not self.parent_gone.is_set():
            # With nothing to compute, sleep until a message comes.
            idle = COMPILING_POLL_MS if self.compiling else IDLE_POLL_MS
            self._receive(0 if engine.has_work else idle)
            while engine.has_work and (seconds := engine.seconds_to_launch()) > 0:
                if not self._receive(int(1e3 * seconds)):
                    time.sleep(min(seconds, SHORT_SLEEP))
                    self._receive()
            for request, compiled in list(self.compiling.values()):
                if compiled.done():
                    del self.compiling[request.id]
                    self._add(request, compiled.result)
            if engine.has_work:
                events = engine.step()
                admitted = [TokenEvent(id=request_id) for request_id in engine.admitted]
                self.links.send_events(admitted + events)
            if self.kv_events is not None:
                self.kv_events.flush()
        engine.close()

    def _receive(self, milliseconds: int = 0) -> bool:
        """Whether something has come, waiting so long for it; it is done."""
        received = self.links.receive(milliseconds)
        for link, message in received:
            match message:
                case ipc.Add(request) if (grammar := request.params.grammar) is not None:
                    compiled = self.compilers.submit(make_constraint, self.engine.constraints, grammar)
                    self.compiling[request.id] = request, compiled
                case ipc.Add(request):
                    self._add(request)
                case ipc.Abort(ids):
                    self._abort(ids)
                case ipc.Query():
                    self._answer(message, link)
        return bool(received)

    def _answer(self, query: ipc.Query, link: int) -> None:
        engine, pending, count, shown = self.engine, self.compiling, 0, b""
        match query.action, query.argument:
            case "flush_cache", _:
                count = engine.cache.flush()
            case "abort", (str() | None) as completion_id:
                live = (*engine.scheduler.live, *pending)
                ids = [request_id for request_id in live if ipc.belongs_to(request_id, completion_id)]
                self._abort(ids)
                count = len(ids)
            case "debug", _:
                shown = snapshot(engine, pending, list(self.steps.records))
            case "steps", int() as step:
                count, shown = self.steps.after(step)
        stats = engine.stats()
        stats = msgspec.structs.replace(stats, waiting=stats.waiting + len(pending))
        self.links.send(ipc.Reply(query.nonce, stats, count, shown), link)

    def _abort(self, ids: list[str]) -> None:
        for request_id in ids:
            if request_id in self.compiling:
                self.compiling.pop(request_id)[1].cancel()
                self.links.send_events([TokenEvent(id=request_id, finish=FinishReason.ABORT)])
        self.engine.abort(ids)

    def _add(self, request: Request, compiled: Callable[[], Constraint | None] = lambda: None) -> None:
        try:
            self.engine.add(request, compiled())
        except InvalidRequestError as error:
            self.links.send_events([TokenEvent(id=request.id, finish=FinishReason.ERROR, error=error.message)])


def watch_parent(stdin: int, gone: threading.Event) -> None:
    """Set `gone` at the end of stdin; a step that runs on for longer than the grace ends with the process."""
    while os.read(stdin, 4096):  # past Python's buffer, whose lock must be free when the interpreter ends
        pass
    gone.set()
    threading.Event().wait(GRACE_SECONDS)
    os._exit(0)


def leave_soon() -> None:
    """A rank is gone: tell those who wait, and end even if a collective never does."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main() -> int:
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=ipc.EngineSetup)
    ipc.start_logging(setup.config, "engine ")
    gone = threading.Event()
    threading.Thread(target=watch_parent, args=(sys.stdin.fileno(), gone), daemon=True).start()
    status = EngineServer(setup, gone).run()
    if setup.config.tp > 1:  # what a broken group left on the device may hold up the interpreter's end
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
