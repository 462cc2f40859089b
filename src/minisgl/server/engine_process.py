"""The engine process: the engine behind sockets. The launcher starts it, an `ipc.EngineSetup` on its stdin.

Stdin stays open for as long as the launcher lives; its end ends the engine too.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import zmq

from minisgl.build import build_engine
from minisgl.core.engine import Engine
from minisgl.core.request_state import Constraint, ConstraintFactory, make_constraint
from minisgl.core.types import FinishReason, Grammar, Request, TokenEvent
from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server import ipc

IDLE_POLL_MS = 200
COMPILING_POLL_MS = 2  # while there is nothing to compute but grammars are being compiled
GRACE_SECONDS = 1.5  # for a step that runs when the launcher or a rank is gone
LINGER_MS = 1000  # for the last messages to leave when the engine ends


class Links:
    """The sockets to the launcher and the API processes; a step's events go straight to the process that asked.

    The other side binds its addresses, this one connects. Nothing here waits: there is no high-water mark, and what is
    sent to a link that is gone is dropped. The number of a link is never used again.
    """

    def __init__(self, to_engine: str, from_engine: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}
        self._addresses: dict[int, str] = {}
        self._owners: dict[str, int] = {}  # the link of each live request, but for the launcher's
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ipc.ToEngine)
        self.attach(ipc.Attach(ipc.LAUNCHER, to_engine, from_engine))

    def attach(self, order: ipc.Attach) -> None:
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, LINGER_MS)
        outbox.connect(order.from_engine)
        self._inbox.connect(order.to_engine)
        self._outboxes[order.link] = outbox
        self._addresses[order.link] = order.to_engine

    def detach(self, link: int) -> list[str]:
        """Forget a process that is gone; its live requests."""
        if link not in self._outboxes:
            return []
        self._inbox.disconnect(self._addresses.pop(link))
        self._outboxes.pop(link).close(linger=0)
        orphans = [request_id for request_id, owner in self._owners.items() if owner == link]
        for request_id in orphans:
            del self._owners[request_id]
        return orphans

    def poll(self, milliseconds: int) -> bool:
        return bool(self._inbox.poll(milliseconds))

    def receive(self) -> ipc.ToEngine | None:
        """The next message, or None when its sender is gone."""
        message: ipc.ToEngine = self._decoder.decode(self._inbox.recv())
        if not isinstance(message, ipc.Abort | ipc.Attach) and message.link not in self._outboxes:
            return None
        if isinstance(message, ipc.Add) and message.link != ipc.LAUNCHER:
            self._owners[message.request.id] = message.link
        return message

    def send(self, message: ipc.FromEngine, link: int = ipc.LAUNCHER) -> None:
        if (outbox := self._outboxes.get(link)) is not None:
            outbox.send(self._encoder.encode(message))

    def send_events(self, events: Sequence[TokenEvent], admitted: Iterable[str] = ()) -> None:
        """Tell each process what a step did for its requests."""
        owners = self._owners
        if not owners:
            self.send(ipc.Events(list(events), list(admitted)))
            return
        shares: dict[int, ipc.Events] = {}
        for request_id in admitted:
            link = owners.get(request_id, ipc.LAUNCHER)
            shares.setdefault(link, ipc.Events([], [])).admitted.append(request_id)
        for event in events:
            link = owners.get(event.id, ipc.LAUNCHER)
            shares.setdefault(link, ipc.Events([], [])).events.append(event)
            if event.finish is not None:
                owners.pop(event.id, None)
        for link, share in shares.items():
            self.send(share, link)

    def revoke(self, completion_id: str | None, asker: int) -> list[str]:
        """The requests of a completion, or all (None), of other links than `asker`; their processes are told of it."""
        owned = [(name, link) for name, link in self._owners.items() if link != asker]
        revoked = [(name, link) for name, link in owned if ipc.belongs_to(name, completion_id)]
        for name, link in revoked:
            self.send(ipc.Revoked([name]), link)
        return [name for name, _ in revoked]

    def close(self) -> None:
        for socket in (self._inbox, *self._outboxes.values()):
            socket.close()


class PendingGrammars:
    """Requests that wait while a thread compiles their grammars, in order. Belongs to the thread that steps."""

    def __init__(self, factory: ConstraintFactory | None) -> None:
        self._factory = factory
        self._thread = ThreadPoolExecutor(1, "minisgl-grammar")
        self._pending: dict[str, tuple[Request, Future[Constraint]]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._pending

    def start(self, request: Request, grammar: Grammar) -> None:
        self._pending[request.id] = (request, self._thread.submit(make_constraint, self._factory, grammar))

    def drop(self, ids: Iterable[str]) -> list[str]:
        """Forget these requests; those of them that were pending."""
        dropped = [request_id for request_id in ids if request_id in self._pending]
        for request_id in dropped:
            self._pending.pop(request_id)[1].cancel()
        return dropped

    def ready(self) -> list[tuple[Request, Constraint | InvalidRequestError]]:
        """The requests whose grammar was compiled, or refused, since the last call."""
        ready: list[tuple[Request, Constraint | InvalidRequestError]] = []
        for request, compiled in [found for found in self._pending.values() if found[1].done()]:
            del self._pending[request.id]
            try:
                ready.append((request, compiled.result()))
            except InvalidRequestError as error:
                ready.append((request, error))
        return ready

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class EngineServer:
    """Moves messages in, steps the engine, moves events out, in one thread, until `parent_gone`."""

    def __init__(self, setup: ipc.EngineSetup, parent_gone: threading.Event) -> None:
        self.config = setup.config
        self.parent_gone = parent_gone
        self.links = Links(setup.to_engine, setup.from_engine)

    def run(self) -> int:
        """Load the model and serve; the exit status."""
        try:
            built = build_engine(self.config, progress=sys.stderr.isatty(), when_gone=leave_soon)
            self.ready = ipc.Ready(built.engine.model, str(built.folder), list(built.notes))
            self.links.send(self.ready)
            self._serve(built.engine, PendingGrammars(built.engine.constraints))
        except MinisglError as error:
            self.links.send(ipc.Failed(error.message))
            return 1
        except Exception as error:
            self.links.send(ipc.Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.links.close()
        return 0

    def _serve(self, engine: Engine, grammars: PendingGrammars) -> None:
        try:
            while not self.parent_gone.is_set():
                # With nothing to compute, sleep until a message comes.
                if engine.has_work or self.links.poll(COMPILING_POLL_MS if grammars else IDLE_POLL_MS):
                    while self.links.poll(0):
                        if (message := self.links.receive()) is not None:
                            self._take(message, engine, grammars)
                for request, compiled in grammars.ready():
                    self._add(engine, request, compiled)
                if engine.has_work:
                    events = engine.step()
                    if events or engine.admitted:
                        self.links.send_events(events, engine.admitted)
        finally:
            grammars.close()
        engine.close()

    def _take(self, message: ipc.ToEngine, engine: Engine, grammars: PendingGrammars) -> None:
        match message:
            case ipc.Add(request):
                grammar = request.params.grammar
                if grammar is None:
                    self._add(engine, request)
                elif request.id in grammars:
                    error = InvalidRequestError(f"a request with id {request.id!r} is running already")
                    self._add(engine, request, error)
                else:
                    grammars.start(request, grammar)
            case ipc.Abort(ids):
                self._abort(ids, engine, grammars)
            case ipc.AbortCompletion(nonce, link, completion_id):
                revoked = self.links.revoke(completion_id, link)
                self._abort(revoked, engine, grammars)
                self.links.send(ipc.CompletionAborted(nonce, len(revoked)), link)
            case ipc.Ping(nonce, link):
                stats = engine.stats()
                stats = msgspec.structs.replace(stats, waiting=stats.waiting + len(grammars))
                self.links.send(ipc.Pong(nonce, stats), link)
            case ipc.FlushCache(nonce, link):
                self.links.send(ipc.CacheFlushed(nonce, engine.flush_cache()), link)
            case ipc.Attach(link):
                self.links.attach(message)
                self.links.send(self.ready, link)
            case ipc.Detach(link):
                self._abort(self.links.detach(link), engine, grammars)

    def _abort(self, ids: list[str], engine: Engine, grammars: PendingGrammars) -> None:
        if dropped := grammars.drop(ids):
            self.links.send_events([TokenEvent(id=gone, finish=FinishReason.ABORT) for gone in dropped])
        engine.abort(ids)

    def _add(self, engine: Engine, request: Request, compiled: Constraint | InvalidRequestError | None = None) -> None:
        """Have the engine take the request, or tell its process why not."""
        try:
            if isinstance(compiled, InvalidRequestError):
                raise compiled
            engine.add(request, compiled)
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
    """Entry point of `python -m minisgl.server.engine_process`."""
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=ipc.EngineSetup)
    level = setup.config.log_level
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    gone = threading.Event()
    threading.Thread(target=watch_parent, args=(sys.stdin.fileno(), gone), daemon=True).start()
    status = EngineServer(setup, gone).run()
    if setup.config.tp > 1:  # what a broken group left on the device may hold up the interpreter's end
        zmq.Context.instance().term()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
