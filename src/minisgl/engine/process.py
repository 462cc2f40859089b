"""The engine process: the engine behind two sockets. Started by the server, one line of JSON on its stdin.

The line is `{"config": {...}, "to_engine": address, "from_engine": address}`. Stdin stays open for as long as the
parent lives; its end means that nobody is left to serve, and the process goes too.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import IO

import msgspec
import zmq

from minisgl.config import Config
from minisgl.engine.build import build_engine
from minisgl.engine.constraint import Constraint
from minisgl.engine.engine import Engine
from minisgl.engine.messages import Abort, Add, Events, Failed, Flush, Flushed, FromEngine, Ping, Pong, Ready, ToEngine
from minisgl.engine.preparing import Preparing
from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.types import FinishReason, Request, TokenEvent

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
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.inbox = context.socket(zmq.PULL)
        self.outbox = context.socket(zmq.PUSH)
        for socket, address in ((self.inbox, start.to_engine), (self.outbox, start.from_engine)):
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def run(self) -> int:
        """Serve until the parent goes; the exit status."""
        try:
            built = build_engine(self.config, progress=sys.stderr.isatty(), when_gone=leave_soon)
            self._send(Ready(built.engine.model, str(built.folder), list(built.notes)))
            self._serve(built.engine)
        except MinisglError as error:
            self._send(Failed(error.message))
            return 1
        except Exception as error:
            self._send(Failed(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self.inbox.close()
            self.outbox.close()
        return 0

    def _send(self, message: FromEngine) -> None:
        self.outbox.send(self._encoder.encode(message))

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
                    self._send(Events(events, engine.admitted))
        finally:
            preparing.close()
        engine.close()

    def _receive(self, engine: Engine, preparing: Preparing, wait: bool) -> None:
        """Take in every message that is there; with nothing to compute, sleep until there is one."""
        if wait and not self.inbox.poll(PREPARING_POLL_MS if preparing else IDLE_POLL_MS):
            return
        while self.inbox.poll(0):
            message = self._decoder.decode(self.inbox.recv())
            match message:
                case Add(request):
                    grammar = request.params.grammar
                    if grammar is None:
                        self._add(engine, request)
                    elif request.id in preparing:
                        self._refuse(
                            request, InvalidRequestError(f"a request with id {request.id!r} is running already")
                        )
                    else:
                        preparing.start(request, grammar)
                case Abort(ids):
                    dropped = preparing.drop(ids)
                    if dropped:
                        self._send(Events([TokenEvent(id=gone, finish=FinishReason.ABORT) for gone in dropped]))
                    engine.abort(ids)
                case Ping(nonce):
                    stats = engine.stats()
                    stats = msgspec.structs.replace(stats, waiting=stats.waiting + len(preparing))
                    self._send(Pong(nonce, stats))
                case Flush(nonce):
                    self._send(Flushed(nonce, engine.flush_cache()))

    def _add(self, engine: Engine, request: Request, constraint: Constraint | None = None) -> None:
        try:
            engine.add(request, constraint)
        except InvalidRequestError as error:
            self._refuse(request, error)

    def _refuse(self, request: Request, error: InvalidRequestError) -> None:
        self._send(Events([TokenEvent(id=request.id, finish=FinishReason.ERROR, error=error.message)]))


def watch_parent(stdin: IO[bytes], gone: threading.Event) -> None:
    """Set `gone` at the end of stdin; a step that runs on for longer than the grace ends with the process."""
    stdin.read()
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
    threading.Thread(target=watch_parent, args=(sys.stdin.buffer, gone), daemon=True).start()
    status = EngineServer(start, gone).run()
    if start.config.tp > 1:  # what a broken group left on the device may hold up the interpreter's end
        zmq.Context.instance().term()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
