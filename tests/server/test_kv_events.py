"""KV events as a router receives them, and that a router which replays them knows exactly what is cached."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.config import Config, KVEventsConfig, check, kv_events
from minisgl.core.pages import CacheManager
from minisgl.core.radix_cache import Node
from minisgl.errors import ConfigError
from minisgl.server.kv_events import REPLAY_END, KVEventPublisher

Blocks = dict[int, tuple[int | None, tuple[int, ...]]]  # by hash: its parent, and its tokens
PAGE = 2


def apply(blocks: Blocks, batch: list[Any]) -> None:
    """What vLLM's documentation says that a batch does to a subscriber's view."""
    _, events, rank = batch
    assert rank == 0
    for event in events:
        match event["type"]:
            case "BlockStored":
                parent, size, tokens = event["parent_block_hash"], event["block_size"], event["token_ids"]
                assert parent is None or parent in blocks
                assert len(tokens) == size * len(event["block_hashes"])
                for index, block in enumerate(event["block_hashes"]):
                    blocks[block] = parent, tuple(tokens[index * size : (index + 1) * size])
                    parent = block
            case "BlockRemoved":
                for block in event["block_hashes"]:
                    del blocks[block]
            case "AllBlocksCleared":
                blocks.clear()


def prefixes(blocks: Blocks) -> set[tuple[int, ...]]:
    def spell(block: int | None) -> tuple[int, ...]:
        return () if block is None else (*spell(blocks[block][0]), *blocks[block][1])

    return {spell(block) for block in blocks}


def cached(node: Node, before: tuple[int, ...] = ()) -> set[tuple[int, ...]]:
    tokens = (*before, *node.tokens.tolist())
    found = {tokens[: len(before) + (page + 1) * PAGE] for page in range(len(node.pages))}
    return found.union(*(cached(child, tokens) for child in node.children.values()))


class Subscriber:
    def __init__(self, endpoint: str, unread: int = 1000) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVHWM, unread)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"kv")
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.socket.connect(endpoint)

    def receive(self) -> tuple[int, list[Any]]:
        topic, number, payload = self.socket.recv_multipart()
        assert (topic, len(number)) == (b"kv-events", 8)
        return int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)


def manager() -> CacheManager:
    return CacheManager(24, PAGE, True, 4, 8)


def serve(cache: CacheManager, tokens: list[int]) -> None:
    """A request from its admission to its end."""
    prompt = np.array(tokens, np.int32)
    cache.acquire(0, cache.match(prompt))
    cache.extend(np.array([0]), np.array([len(prompt)]))
    cache.publish(0, prompt, len(prompt))
    cache.release(0, prompt, len(prompt))


Open = Callable[..., KVEventPublisher]


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Open]:
    opened = []

    def start(**changes: Any) -> KVEventPublisher:
        endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
        said = KVEventsConfig(topic="kv-events", endpoint=endpoint, replay_endpoint=replay, **changes)
        opened.append(KVEventPublisher(said, PAGE))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


class Recorder(KVEventPublisher):
    """A publisher whose batches a test reads where they would be sent."""

    def __init__(self) -> None:
        super().__init__(KVEventsConfig(endpoint="inproc://recorder"), PAGE)
        self.blocks: Blocks = {}

    def flush(self) -> None:
        apply(self.blocks, [0.0, self._events, 0])
        self._events = []


@given(st.lists(st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=3, max_size=12)), max_size=40))
@settings(deadline=None, max_examples=60)
def test_who_replays_the_events_knows_exactly_the_cached_blocks(requests: list[list[int] | None]) -> None:
    cache, recorder = manager(), Recorder()
    cache.tree.listener = recorder
    try:
        for tokens in requests:
            if tokens is None:
                cache.flush()
            else:
                serve(cache, tokens)
            recorder.flush()
            assert prefixes(recorder.blocks) == cached(cache.tree.root)
            assert len(recorder.blocks) == len(recorder._hashes) == cache.num_cached
    finally:
        recorder.close()


def test_a_subscriber_receives_batches_and_asks_for_those_it_missed(publisher: Open, tmp_path: Path) -> None:
    events, cache = publisher(), manager()
    cache.tree.listener = events
    serve(cache, [1, 2, 3, 4])
    events.flush()
    subscriber = Subscriber(f"ipc://{tmp_path}/events")
    received: list[tuple[int, list[Any]]] = []
    for first in range(5, 200):  # until the subscription has arrived
        serve(cache, [first, 0, 0])
        events.flush()
        if subscriber.socket.poll(20):
            received.append(subscriber.receive())
            break
    replay: zmq.Socket[bytes]
    number: bytes
    payload: bytes
    for kind in (zmq.DEALER, zmq.REQ):
        with zmq.Context.instance().socket(kind) as replay:
            replay.setsockopt(zmq.RCVTIMEO, 5000)
            replay.connect(f"ipc://{tmp_path}/replay")
            replay.send((0).to_bytes(8, "big"))
            number, payload = replay.recv_multipart()
            assert number == (0).to_bytes(8, "big")
            blocks: Blocks = {}
            apply(blocks, msgspec.msgpack.decode(payload))
            assert prefixes(blocks) == {(1, 2), (1, 2, 3, 4)}
            if kind == zmq.DEALER:
                answers: list[list[bytes]] = list(iter(replay.recv_multipart, [REPLAY_END, b""]))
                assert len(answers) == events._sent - 1
    assert received[0][0] > 0
    subscriber.socket.close()


def test_nothing_waits_or_grows_without_a_subscriber(publisher: Open) -> None:
    events, cache = publisher(buffer_steps=3, hwm=1), manager()
    cache.tree.listener = events
    for first in range(500):
        serve(cache, [first, 1, 2, 3])
        events.flush()
    assert [number for number, _ in events._kept] == [497, 498, 499]
    assert events._kept_bytes == sum(len(payload) for _, payload in events._kept)
    assert len(events._hashes) == cache.num_cached <= cache.num_pages


def test_a_flush_that_leaves_no_page_is_one_event(publisher: Open) -> None:
    events, cache = publisher(), manager()
    cache.tree.listener = events
    serve(cache, [1, 2, 3, 4])
    serve(cache, [5, 6])
    cache.acquire(0, cache.match(np.array([5, 6, 7], np.int32)))
    cache.flush()
    events.flush()
    cache.release(0, np.array([5, 6, 7], np.int32), 2)
    cache.flush()
    events.flush()
    batches = [msgspec.msgpack.decode(payload)[1] for _, payload in events._kept]
    kept_one = ["BlockStored", "BlockStored", "BlockRemoved"]
    assert [[event["type"] for event in batch] for batch in batches] == [kept_one, ["AllBlocksCleared"]]


def test_a_subscriber_that_never_reads_stops_nothing_and_loses_what_does_not_fit(
    publisher: Open, tmp_path: Path
) -> None:
    events = publisher(buffer_steps=3, hwm=2)
    subscriber = Subscriber(f"ipc://{tmp_path}/events", unread=2)
    tokens, pages = np.arange(4000, dtype=np.int32), np.arange(2000, dtype=np.int32)
    while not subscriber.socket.poll(20):  # until the subscription has arrived
        events.stored(None, tokens, pages)
        events.flush()
    for _ in range(2000):  # 30 MB; a queue of the system's holds less than 1
        events.stored(None, tokens, pages)
        events.flush()
    received = [subscriber.receive()[0]]
    while subscriber.socket.poll(200):
        received.append(subscriber.receive()[0])
    assert len(received) < 200
    assert events._sent - received[-1] > 1800
    subscriber.socket.close()


def test_events_may_be_the_arrays_of_earlier_versions(publisher: Open) -> None:
    events, cache = publisher(encoding="array"), CacheManager(1, PAGE, True, 1, 1)
    cache.tree.listener = events
    serve(cache, [1, 2])
    cache.extend(np.array([0]), np.array([PAGE]))  # which takes the only page
    events.flush()
    events.cleared()
    events.flush()
    (stored, removed), (cleared,) = (msgspec.msgpack.decode(payload)[1] for _, payload in events._kept)
    (block,) = stored[1]
    assert stored == ["BlockStored", [block], None, [1, 2], PAGE, None, "GPU", None]
    assert removed == ["BlockRemoved", [block], "GPU"]
    assert cleared == ["AllBlocksCleared"]
    assert block == 1581624067414295539  # the same in every process


def test_the_flag_takes_what_vllm_takes_and_refuses_the_rest_by_name() -> None:
    vllm = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv-events"}'
    assert kv_events(Config(kv_events_config=vllm)) == KVEventsConfig(topic="kv-events")
    for off in (None, '{"enable_kv_cache_events": false}', '{"publisher": "null"}'):
        assert kv_events(Config(kv_events_config=off)) is None
    for wrong in ("", "[]", '{"hwm": 0}', '{"publisher": "nats"}', '{"max_queue_size": 5}'):
        with pytest.raises(ConfigError, match="--kv-events-config"):
            check(Config(kv_events_config=wrong))
    for name in ("endpoint", "replay_endpoint"):
        check(Config(kv_events_config=f'{{"{name}": "tcp://[::1]:65535"}}'))
        with pytest.raises(ConfigError, match=r"--kv-events-config: tcp://\*:71093: a port is at most 65535"):
            check(Config(kv_events_config=f'{{"{name}": "tcp://*:71093"}}'))
    with pytest.raises(ConfigError, match="naive"):
        check(Config(kv_events_config="{}", cache="naive"))
    with pytest.raises(ConfigError, match="an endpoint cannot be used"):
        KVEventPublisher(KVEventsConfig(endpoint="ipc:///missing/folder/events"), PAGE)
