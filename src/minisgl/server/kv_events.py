"""KV events for prefix-aware routers, over ZeroMQ in vLLM's format: which blocks (pages) the prefix cache has.

A message is (topic, sequence number, batch), the number in 8 bytes, big-endian. A batch is the MessagePack array
[time, events, data-parallel rank]. A block's hash covers its tokens and those before it, the same in every process.
"""

import hashlib
import threading
import time
from collections import deque
from typing import Any

import msgspec
import zmq

from minisgl.config import KVEventsConfig
from minisgl.core.plan import Int32
from minisgl.errors import ConfigError

MEDIUM = "GPU"  # vLLM's word for the memory that attention reads
REPLAY_BYTES = 64 * 2**20
REPLAY_SEND_MS = 1000  # that a reader of a replay may stall before it gets no more
REPLAY_END = b"\xff" * 8


class KVEventPublisher:
    """Publishes what it hears as a `CacheListener`, a batch at each `flush`, from the thread that steps.

    Nothing waits for a subscriber: one that lags by more than `hwm` batches loses some, sees it by their numbers, and
    may ask `replay_endpoint` for them, which remembers `buffer_steps` batches or 64 MiB. Raises ConfigError where an
    endpoint cannot be used.
    """

    def __init__(self, config: KVEventsConfig, page_size: int) -> None:
        self._topic, self._as_arrays, self._page_size = config.topic.encode(), config.encoding == "array", page_size
        self._hashes: dict[int, bytes] = {}  # by page id, of what is cached
        self._events: list[dict[str, Any]] = []
        self._sent = self._kept_bytes = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._max_kept = config.buffer_steps if config.replay_endpoint else 0
        self._lock = threading.Lock()  # of `_kept`
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._replay: threading.Thread | None = None
        try:
            self._publisher = self._open(zmq.PUB, config.endpoint, config.hwm)
            if config.replay_endpoint:
                router = self._open(zmq.ROUTER, config.replay_endpoint, config.hwm)
                router.setsockopt(zmq.ROUTER_MANDATORY, 1)
                router.setsockopt(zmq.SNDTIMEO, REPLAY_SEND_MS)
                self._replay = threading.Thread(target=self._serve_replays, args=(router,), daemon=True)
                self._replay.start()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"--kv-events-config: an endpoint cannot be used: {error.strerror}") from error

    def stored(self, parent: int | None, tokens: Int32, pages: Int32) -> None:
        before = b"" if parent is None else self._hashes[parent]
        first, data, size = before, tokens.tobytes(), self._page_size * tokens.itemsize
        hashes = []
        for index, page in enumerate(pages.tolist()):
            block = before + data[index * size : (index + 1) * size]
            before = self._hashes[page] = hashlib.blake2b(block, digest_size=8).digest()
            hashes.append(as_integer(before))
        self._events.append({
            "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": as_integer(first) if first else None,
            "token_ids": tokens.tolist(), "block_size": self._page_size, "lora_id": None, "medium": MEDIUM,
            "lora_name": None,
        })  # fmt: skip

    def removed(self, pages: Int32) -> None:
        hashes = [as_integer(self._hashes.pop(page)) for page in pages.tolist()]
        self._events.append({"type": "BlockRemoved", "block_hashes": hashes, "medium": MEDIUM})

    def cleared(self) -> None:
        self._events = [{"type": "AllBlocksCleared"}]  # what came before it in a batch tells a subscriber no more

    def flush(self) -> None:
        if not self._events:
            return
        events: list[Any] = [list(e.values()) for e in self._events] if self._as_arrays else self._events
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._events = []
        if self._max_kept:
            with self._lock:
                self._kept.append((self._sent, payload))
                self._kept_bytes += len(payload)
                while len(self._kept) > self._max_kept or self._kept_bytes > REPLAY_BYTES:
                    self._kept_bytes -= len(self._kept.popleft()[1])
        self._publisher.send_multipart([self._topic, self._sent.to_bytes(8, "big"), payload])
        self._sent += 1

    def close(self) -> None:
        self._publisher.close(linger=0)
        self._context.term()  # which ends the thread
        if self._replay is not None:
            self._replay.join()

    def _open(self, kind: int, endpoint: str, hwm: int) -> zmq.Socket[bytes]:
        """Bind to a wildcard and to ipc, as vLLM does; connect to any other address."""
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, hwm)
        socket.setsockopt(zmq.IPV6, "[" in endpoint)
        socket.setsockopt(zmq.LINGER, 0)
        binds = "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://"))
        (socket.bind if binds else socket.connect)(endpoint)
        return socket

    def _serve_replays(self, router: zmq.Socket[bytes]) -> None:
        """To each request, the number of a batch, send the kept batches from there on, and an empty one at the end."""
        while True:
            try:
                *envelope, start = router.recv_multipart()
                with self._lock:
                    kept = [batch for batch in self._kept if batch[0] >= int.from_bytes(start, "big")]
                for number, payload in kept:
                    router.send_multipart([*envelope, number.to_bytes(8, "big"), payload])
                router.send_multipart([*envelope, REPLAY_END, b""])
            except zmq.ContextTerminated:
                router.close()
                return
            except zmq.ZMQError:  # that client is gone, or does not read
                continue


def as_integer(digest: bytes) -> int:
    return int.from_bytes(digest, "big") >> 1  # one bit less: routers read it as signed or unsigned
