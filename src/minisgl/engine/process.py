"""The engine process: the engine behind sockets. Started by the server, one line of JSON on its stdin.

The line is `{"config": {...}, "to_engine": address, "from_engine": address}`. Stdin stays open for as long as the
parent lives; its end means that nobody is left to serve, and the process goes too.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

import msgspec
import zmq

from minisgl.build import build_engine
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.request_state import Constraint
from minisgl.core.types import FinishReason, Request, TokenEvent
from minisgl.engine.links import Links
from minisgl.engine.messages import Abort, Add, Attach, Detach, Failed, Flush, Flushed, Ping, Pong, Ready, ToEngine
from minisgl.engine.preparing import Preparing
from minisgl.errors import InvalidRequestError, MinisglError

IDLE_POLL_MS = 200
PREPARING_POLL_MS = 2
"""While nothing but constraints is being made."""
GRACE_SECONDS = 1.5


class StartLine(msgspec.Struct, frozen=True):
    """What the parent says first."""

    config: Config
    to_engine: str
    from_engine: str


class EngineServer:
    """Moves messages in, steps the engine, moves events out, in one thread."""

    def __init__(self, start: StartLine, parent_gone: threading.Event) -> None:
        self.config = start.config
        self.parent_gone = parent_gone
        self.links = Links(start.to_engine, start.from_engine)
        self.ready: Ready | None = None

    def run(self) -> int:
        """Serve until the parent goes; the exit status."""
        try:
            built = build_engine(self.config, progress=sys.stderr.isatty(), when_gone=leave_soon)
            self.ready = Ready(built.engine.model, str(built.folder), list(built.notes))
            self.links.send(self.ready)
            self._serve(built.engine)
        except MinisglError as error:
            self.links.send(Failed(error.message))
            return 1
        except Exception as error:
            self.links.send(Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.links.close()
        return 0

    def _serve(self, engine: Engine) -> None:
        preparing = Preparing(engine.constraints)
        try:
            while not self.parent_gone.is_set():
                self._receive(engine, preparing, wait=not engine.has_work)
                for request, made in preparing.ready():
                    if isinstance(made, InvalidRequestError):
                        self._refuse(request, made)
                    else:
                        self._add(engine, request, made)
                if not engine.has_work:
                    continue
                events = engine.step()
                if events or engine.admitted:
                    self.links.send_events(events, engine.admitted)
        finally:
            preparing.close()
        engine.close()

    def _receive(self, engine: Engine, preparing: Preparing, wait: bool) -> None:
        """Take in every message that is there; with nothing to compute, sleep until there is one."""
        if wait and not self.links.poll(PREPARING_POLL_MS if preparing else IDLE_POLL_MS):
            return
        while self.links.poll(0):
            if (message := self.links.receive()) is not None:
                self._take(message, engine, preparing)

    def _take(self, message: ToEngine, engine: Engine, preparing: Preparing) -> None:
        match message:
            case Add(request):
                grammar = request.params.grammar
                if grammar is None:
                    self._add(engine, request)
                elif request.id in preparing:
                    self._refuse(request, InvalidRequestError(f"a request with id {request.id!r} is running already"))
                else:
                    preparing.start(request, grammar)
            case Abort(ids):
                self._abort(ids, engine, preparing)
            case Ping(nonce, link):
                stats = engine.stats()
                stats = msgspec.structs.replace(stats, waiting=stats.waiting + len(preparing))
                self.links.send(Pong(nonce, stats), link)
            case Flush(nonce, link):
                self.links.send(Flushed(nonce, engine.flush_cache()), link)
            case Attach(link):
                self.links.attach(message)
                assert self.ready is not None
                self.links.send(self.ready, link)
            case Detach(link):
                self._abort(self.links.detach(link), engine, preparing)

    def _abort(self, ids: list[str], engine: Engine, preparing: Preparing) -> None:
        if dropped := preparing.drop(ids):
            self.links.send_events([TokenEvent(id=gone, finish=FinishReason.ABORT) for gone in dropped])
        engine.abort(ids)

    def _add(self, engine: Engine, request: Request, constraint: Constraint | None = None) -> None:
        try:
            engine.add(request, constraint)
        except InvalidRequestError as error:
            self._refuse(request, error)

    def _refuse(self, request: Request, error: InvalidRequestError) -> None:
        self.links.send_events([TokenEvent(id=request.id, finish=FinishReason.ERROR, error=error.message)])


def watch_parent(stdin: int, gone: threading.Event) -> None:
    """Set `gone` at the end of stdin; a step that runs on for longer than the grace ends with the process.

    It reads past Python's buffer, whose lock must be free when the interpreter ends.
    """
    while os.read(stdin, 4096):
        pass
    gone.set()
    threading.Event().wait(GRACE_SECONDS)
    os._exit(0)


def leave_soon() -> None:
    """A rank is gone: say so to whoever waits, and end even if a collective never does."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main() -> int:
    """Entry point of `python -m minisgl.engine.process`."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=StartLine)
    logging.basicConfig(level=start.config.log_level, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    gone = threading.Event()
    threading.Thread(target=watch_parent, args=(sys.stdin.fileno(), gone), daemon=True).start()
    status = EngineServer(start, gone).run()
    if start.config.tp > 1:  # what a broken group left on the device may hold up the interpreter's end
        zmq.Context.instance().term()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
