"""Whom the engine process talks to: its parent, and the API processes that the parent tells it of.

What a step did goes straight to the process that asked, so that no process has to pass on the others' tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import zmq

from minisgl.core.types import TokenEvent
from minisgl.engine.messages import Add, Attach, Events, Flush, FromEngine, Ping, ToEngine

PARENT = 0
"""The parent's link; it is there from the start."""
LINGER_MS = 1000
"""How long what was said last may take to leave when the engine ends."""


class Links:
    """Messages from every link come in one queue. A link is a number that is never used again.

    The other side binds its addresses, this one connects. Nothing here waits or is turned away: there is no high-water
    mark, and a link that is gone swallows what is said to it.
    """

    def __init__(self, to_engine: str, from_engine: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._outboxes: dict[int, zmq.Socket[bytes]] = {}
        self._addresses: dict[int, str] = {}
        self._owners: dict[str, int] = {}
        """The link of each live request, the parent's left out."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self.attach(Attach(PARENT, to_engine, from_engine))

    def attach(self, order: Attach) -> None:
        """Begin to listen and talk to another process."""
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, 0)
        outbox.setsockopt(zmq.LINGER, LINGER_MS)
        outbox.connect(order.from_engine)
        self._inbox.connect(order.to_engine)
        self._outboxes[order.link] = outbox
        self._addresses[order.link] = order.to_engine

    def detach(self, link: int) -> list[str]:
        """Forget a process that is gone; its requests that were live."""
        if link not in self._outboxes:
            return []
        self._inbox.disconnect(self._addresses.pop(link))
        self._outboxes.pop(link).close(linger=0)
        orphans = [request_id for request_id, owner in self._owners.items() if owner == link]
        for request_id in orphans:
            del self._owners[request_id]
        return orphans

    def poll(self, milliseconds: int) -> bool:
        """Whether a message is there, waiting for one for so long."""
        return bool(self._inbox.poll(milliseconds))

    def receive(self) -> ToEngine | None:
        """The next message, or None when what sent it is gone. A request belongs to its sender from here on."""
        message: ToEngine = self._decoder.decode(self._inbox.recv())
        if isinstance(message, Add | Ping | Flush) and message.link not in self._outboxes:
            return None
        if isinstance(message, Add) and message.link != PARENT:
            self._owners[message.request.id] = message.link
        return message

    def send(self, message: FromEngine, link: int = PARENT) -> None:
        """Say something to one process."""
        if (outbox := self._outboxes.get(link)) is not None:
            outbox.send(self._encoder.encode(message))

    def send_events(self, events: Sequence[TokenEvent], admitted: Iterable[str] = ()) -> None:
        """Tell each process what a step did for its requests."""
        owners = self._owners
        if not owners:
            self.send(Events(list(events), list(admitted)))
            return
        shares: dict[int, Events] = {}
        for request_id in admitted:
            link = owners.get(request_id, PARENT)
            shares.setdefault(link, Events([], [])).admitted.append(request_id)
        for event in events:
            link = owners.get(event.id, PARENT)
            shares.setdefault(link, Events([], [])).events.append(event)
            if event.finish is not None:
                owners.pop(event.id, None)
        for link, share in shares.items():
            self.send(share, link)

    def close(self) -> None:
        """Close the sockets."""
        for socket in (self._inbox, *self._outboxes.values()):
            socket.close()
