"""The engine process: the engine behind sockets. Stdin begins with an `ipc.EngineSetup`; its end ends the engine."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import zmq

from minisgl.build import build_engine
from minisgl.config import kv_events
from minisgl.core.engine import Engine
from minisgl.core.request_state import Constraint, ConstraintFactory, make_constraint
from minisgl.core.types import FinishReason, Grammar, Request, TokenEvent
from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server import ipc
from minisgl.server.debug import StepLog, snapshot
from minisgl.server.kv_events import KVEventPublisher

IDLE_POLL_MS = 200
SHORT_SLEEP = 2e-4  # s; what a poll in whole milliseconds cannot wait for
COMPILERS = 2  # threads, so that a known grammar need not wait for a slow one
COMPILING_POLL_MS = 2  # while there is nothing to compute but grammars are being compiled
GRACE_SECONDS = 1.5  # for a step that runs when the launcher or a rank is gone
LINGER_MS = 1000  # for the last messages to leave when the engine ends


class Links:
    """The sockets to the launcher and the API processes, which bind them. Nothing here waits: there is no high-water
    mark, and what is sent to a link that is gone is dropped. The number of a link is never used again.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}
        self._owners: dict[str, int] = {}  # the link of each live request, but for the launcher's
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ipc.ToEngine)
        self.attach(ipc.LAUNCHER)

    def attach(self, link: int) -> None:
        to_engine, from_engine = ipc.addresses(self._folder, link)
        outbox = self._outboxes[link] = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, LINGER_MS)
        outbox.connect(from_engine)
        self._inbox.connect(to_engine)

    def detach(self, link: int) -> list[str]:
        """Forget a process that is gone; its live requests."""
        if link not in self._outboxes:
            return []
        self._inbox.disconnect(ipc.addresses(self._folder, link)[0])
        self._outboxes.pop(link).close(linger=0)
        orphans = [request_id for request_id, owner in self._owners.items() if owner == link]
        for request_id in orphans:
            del self._owners[request_id]
        return orphans

    def poll(self, milliseconds: int) -> bool:
        return bool(self._inbox.poll(milliseconds))

    def receive(self) -> ipc.ToEngine | None:
        """The next message, None when its sender is gone."""
        message: ipc.ToEngine = self._decoder.decode(self._inbox.recv())
        if not isinstance(message, ipc.Abort | ipc.Attach) and message.link not in self._outboxes:
            return None
        if isinstance(message, ipc.Add) and message.link != ipc.LAUNCHER:
            self._owners[message.request.id] = message.link
        return message

    def send(self, message: ipc.FromEngine, link: int = ipc.LAUNCHER) -> None:
        if (outbox := self._outboxes.get(link)) is not None:
            outbox.send(self._encoder.encode(message))

    def send_events(self, events: list[TokenEvent], admitted: Iterable[str] = ()) -> None:
        owners = self._owners
        if not owners:
            self.send(ipc.Events(events, list(admitted)))
            return
        shares = {link: ipc.Events([], []) for link in self._outboxes}
        for request_id in admitted:
            shares[owners.get(request_id, ipc.LAUNCHER)].admitted.append(request_id)
        for event in events:
            shares[owners.get(event.id, ipc.LAUNCHER)].events.append(event)
            if event.finish is not None:
                owners.pop(event.id, None)
        for link, share in shares.items():
            if share.events or share.admitted:
                self.send(share, link)

    def close(self) -> None:
        for socket in (self._inbox, *self._outboxes.values()):
            socket.close()


class PendingGrammars:
    """Requests that wait while threads compile their grammars. Belongs to the thread that steps."""

    def __init__(self, factory: ConstraintFactory | None) -> None:
        self._factory = factory
        self._threads = ThreadPoolExecutor(COMPILERS, "minisgl-grammar")
        self.requests: dict[str, tuple[Request, Future[Constraint]]] = {}

    def start(self, request: Request, grammar: Grammar) -> None:
        self.requests[request.id] = (request, self._threads.submit(make_constraint, self._factory, grammar))

    def drop(self, ids: Iterable[str]) -> list[str]:
        """Forget these requests; those of them that were pending."""
        dropped = [request_id for request_id in ids if request_id in self.requests]
        for request_id in dropped:
            self.requests.pop(request_id)[1].cancel()
        return dropped

    def ready(self) -> list[tuple[Request, Future[Constraint]]]:
        ready = [(request, compiled) for request, compiled in self.requests.values() if compiled.done()]
        for request, _ in ready:
            del self.requests[request.id]
        return ready

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class EngineServer:
    """Moves messages in, steps the engine, moves events out, in one thread, until `parent_gone`."""

    engine: Engine
    grammars: PendingGrammars
    ready: ipc.Ready
    kv_events: KVEventPublisher | None = None

    def __init__(self, setup: ipc.EngineSetup, parent_gone: threading.Event) -> None:
        self.config, self.parent_gone = setup.config, parent_gone
        self.links = Links(setup.folder)
        self.steps = StepLog(lambda events, link: self.links.send(ipc.Steps(events), link))

    def run(self) -> int:
        try:
            if (said := kv_events(self.config)) is not None:
                self.kv_events = KVEventPublisher(said, self.config.page_size)
            built = build_engine(self.config, progress=sys.stderr.isatty(), on_failure=leave_soon)
            self.engine, self.grammars = built.engine, PendingGrammars(built.engine.constraints)
            if self.kv_events is not None:
                self.engine.cache.listen(self.kv_events)
            if self.config.debug_endpoints:
                self.engine.observe(self.steps)
            self.ready = ipc.Ready(built.engine.model, str(built.folder), list(built.notes))
            self.links.send(self.ready)
            self._serve()
        except MinisglError as error:
            self.links.send(ipc.Failed(error.message))
            return 1
        except Exception as error:
            self.links.send(ipc.Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.links.close()
            if self.kv_events is not None:
                self.kv_events.close()
        return 0

    def _serve(self) -> None:
        engine, grammars = self.engine, self.grammars
        try:
            while not self.parent_gone.is_set():
                # With nothing to compute, sleep until a message comes.
                if engine.has_work or self.links.poll(COMPILING_POLL_MS if grammars.requests else IDLE_POLL_MS):
                    self._receive()
                    while engine.has_work and (seconds := engine.seconds_to_launch()) > 0:
                        if not self.links.poll(int(1e3 * seconds)):
                            time.sleep(min(seconds, SHORT_SLEEP))
                        self._receive()
                for request, compiled in grammars.ready():
                    self._add(request, compiled.result)
                if engine.has_work:
                    events = engine.step()
                    if events or engine.admitted:
                        self.links.send_events(events, engine.admitted)
                    if self.config.debug_endpoints:
                        self.steps.flush(not engine.has_work)
                if self.kv_events is not None:
                    self.kv_events.flush()
        finally:
            grammars.close()
        engine.close()

    def _receive(self) -> None:
        while self.links.poll(0):
            if (message := self.links.receive()) is not None:
                self._handle(message)

    def _handle(self, message: ipc.ToEngine) -> None:
        match message:
            case ipc.Add(request):
                grammar = request.params.grammar
                if grammar is None:
                    self._add(request)
                elif request.id in self.grammars.requests:
                    self._refuse(request, f"a request with id {request.id!r} is running already")
                else:
                    self.grammars.start(request, grammar)
            case ipc.Abort(ids):
                self._abort(ids)
            case ipc.Query():
                self._answer(message)
            case ipc.Watch(link, on):
                self.steps.watch(link, on)
            case ipc.Attach(link):
                self.links.attach(link)
                self.links.send(self.ready, link)
            case ipc.Detach(link):
                self.steps.watch(link, False)
                self._abort(self.links.detach(link))

    def _answer(self, query: ipc.Query) -> None:
        engine, pending, count, shown = self.engine, self.grammars.requests, 0, b""
        if query.action == "flush_cache":
            count = engine.flush_cache()
        elif query.action == "abort":
            live = (*engine.scheduler.live, *pending)
            ids = [request_id for request_id in live if ipc.belongs_to(request_id, query.completion_id)]
            self._abort(ids)
            count = len(ids)
        elif query.action == "debug":
            shown = snapshot(engine, pending, self.steps.recent)
        stats = engine.stats()
        stats = msgspec.structs.replace(stats, waiting=stats.waiting + len(pending))
        self.links.send(ipc.Reply(query.nonce, stats, count, shown), query.link)

    def _abort(self, ids: list[str]) -> None:
        if dropped := self.grammars.drop(ids):
            self.links.send_events([TokenEvent(id=gone, finish=FinishReason.ABORT) for gone in dropped])
        self.engine.abort(ids)

    def _add(self, request: Request, compiled: Callable[[], Constraint | None] = lambda: None) -> None:
        try:
            self.engine.add(request, compiled())
        except InvalidRequestError as error:
            self._refuse(request, error.message)

    def _refuse(self, request: Request, error: str) -> None:
        self.links.send_events([TokenEvent(id=request.id, finish=FinishReason.ERROR, error=error)])


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
        zmq.Context.instance().term()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
