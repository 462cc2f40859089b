"""The engine process: each API process gets its own events, and grammars are compiled beside the steps.

Messages arrive whole and in order, nobody waits for a slow reader, and the end of a process is noticed.
"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from helpers.constraints import Cycle, cycle
from helpers.engine_thread import EngineThread
from helpers.simulation import VOCAB, simulated_engine
from minisgl.config import Config
from minisgl.core.request_state import Constraint
from minisgl.core.types import FinishReason, Grammar, ModelInfo, Request, SamplingParams, TokenEvent
from minisgl.server import ipc
from minisgl.server.engine_client import SocketEngineClient
from minisgl.server.engine_process import Links
from minisgl.server.errors import RequestAbortedError
from minisgl.system import PrivateFolder

READY = ipc.Ready(ModelInfo(name="stub", vocab_size=100, max_seq_len=100, eos_token_ids=(0,)), "/nowhere", [])


@pytest.fixture
async def clients() -> AsyncIterator[list[SocketEngineClient]]:
    """The clients of three processes of one simulated engine."""
    engine = simulated_engine(max_seq_len=2000, num_pages=2000)
    with PrivateFolder() as folder:
        clients = [SocketEngineClient(folder, Config()) for _ in range(2)]
        async with EngineThread(engine).start(folder):
            assert (await clients[0].ready()).model == engine.model
            clients.append(SocketEngineClient(folder, Config()))  # of a process that took another's place
            for client in clients:
                assert (await client.ready()).model == engine.model
            yield clients
        for client in clients:
            await client.close()


def request(name: str, max_tokens: int) -> Request:
    return Request.make(id=name, prompt=[5] * 40, params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def answer(client: SocketEngineClient, asked: Request) -> list[TokenEvent]:
    with client.submit([asked]) as group:
        return [event async for batch in group.batches() for event in batch.events]


async def test_every_process_gets_the_events_of_its_own_requests(clients: list[SocketEngineClient]) -> None:
    asked = [(link, request(f"{link}-{i}", 10 + i)) for i in range(8) for link in (0, 1, 2)]
    answers = await asyncio.gather(*(answer(clients[link], one) for link, one in asked))
    for (_, one), events in zip(asked, answers, strict=True):
        assert {event.id for event in events} == {one.id}
        assert sum(len(event.tokens) for event in events) == one.params.max_tokens
        assert [event.finish for event in events if event.finish] == [FinishReason.LENGTH]
    for client in clients:
        count = client.metrics.registry.get_sample_value("minisgl:request_queue_time_seconds_count")
        assert count == 8
        stats = await client.ping(5)
        assert (stats.running, stats.waiting, stats.generated_tokens) == (0, 0, 3 * sum(range(10, 18)))


async def test_a_request_that_is_admitted_again_waited_until_the_first_time(clients: list[SocketEngineClient]) -> None:
    client, asked = clients[0], request("retracted", 1900)
    with client.submit([asked]):
        stats, _ = client._live[asked.id]
        for now in (stats.arrived + 0.5, stats.arrived + 9):
            client._on_events(ipc.Events([TokenEvent(id=asked.id)]), now)
        assert stats.admitted == stats.arrived + 0.5


async def test_the_requests_of_a_process_that_is_gone_are_aborted_and_others_go_on(
    clients: list[SocketEngineClient],
) -> None:
    other, lost, kept = clients
    going_on = [asyncio.create_task(answer(kept, request(f"kept-{i}", 400))) for i in range(3)]
    group = lost.submit([request(f"lost-{i}", 1900) for i in range(5)])
    not_begun = {f"lost-{i}" for i in range(5)}
    async for batch in group.batches():
        not_begun -= {event.id for event in batch.events}
        if not not_begun:  # what comes after the end of a link is not taken
            break
    lost.fail("it is dead")  # says nothing to the engine any more
    await lost.close()
    for events in await asyncio.gather(*going_on):
        assert sum(len(event.tokens) for event in events) == 400
    for _ in range(3):  # each is answered between two steps
        stats = await other.ping(5)
    assert (stats.running, stats.waiting, stats.aborted) == (0, 0, 5)
    assert stats.pages_free + stats.pages_cached == stats.pages_total


@pytest.mark.parametrize(("completion_id", "count"), [("a", 2), ("a-1", 1), (None, 3), ("b", 0)])
async def test_an_answer_is_aborted_in_the_process_that_has_it(
    clients: list[SocketEngineClient], completion_id: str | None, count: int
) -> None:
    _, asked, owner = clients
    group = owner.submit([request(name, 1900) for name in ("a-0", "a-1", "c-0")])
    own = asyncio.create_task(answer(asked, request("d-0", 400)))
    while (await asked.ping(5)).running < 4:
        await asyncio.sleep(0.001)
    assert (await asked.query("abort", 5, completion_id)).count == count + (completion_id is None)
    if count:
        with pytest.raises(RequestAbortedError):
            async for _ in group.batches():
                pass
        assert owner.num_live == 0
    if completion_id is None:
        with pytest.raises(RequestAbortedError):
            await own
    else:
        assert sum(len(event.tokens) for event in await own) == 400
    group.__exit__(None, None, None)
    while (await asked.ping(5)).running:
        pass
    assert (await asked.ping(5)).aborted == 3 + (completion_id is None)


async def test_no_request_waits_for_the_grammar_of_another(tmp_path: Path) -> None:
    gate, engine = threading.Event(), simulated_engine()

    def factory(grammar: Grammar) -> Constraint:
        assert grammar.source != "slow" or gate.wait(10)
        if grammar.source == "broken":
            raise RuntimeError("too much")
        return Cycle(cycle(5, 100), VOCAB, eos=1)

    engine.constraints = factory
    async with asyncio.timeout(20), EngineThread(engine).start(str(tmp_path)):
        client = SocketEngineClient(str(tmp_path), Config())
        await client.ready()

        async def last(name: str) -> TokenEvent:
            grammar = Grammar(kind="regex", source=name)
            params = SamplingParams(max_tokens=3, ignore_eos=True, grammar=grammar)
            return (await answer(client, Request.make(id=name, prompt=[9], params=params)))[-1]

        slow = asyncio.create_task(last("slow"))
        assert (await last("quick")).finish == FinishReason.LENGTH
        assert (await last("broken")).error == "this regex cannot be followed: too much"
        assert not slow.done()
        gate.set()
        assert (await slow).finish == FinishReason.LENGTH
        await client.close()


def framed(message: ipc.ToEngine | ipc.FromEngine) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "little") + data


class End:
    """The other end of a link."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(ipc.address(str(folder)))
        self.socket.settimeout(5)
        self.unread = b""
        self.seen: list[ipc.FromEngine] = []

    def send(self, message: ipc.ToEngine) -> None:
        self.socket.sendall(framed(message))

    def read(self) -> None:
        self.unread += self.socket.recv(2**18)
        while len(self.unread) > 4 and len(self.unread) >= (end := 4 + int.from_bytes(self.unread[:4], "little")):
            self.seen.append(msgspec.msgpack.decode(self.unread[4:end], type=ipc.FromEngine))
            self.unread = self.unread[end:]


@pytest.fixture
def links(tmp_path: Path) -> Iterator[Links]:
    links = Links(str(tmp_path))
    yield links
    links.close()


def add(name: str) -> ipc.Add:
    return ipc.Add(Request.make(id=name, prompt=[5], params=SamplingParams()))


def event(name: str, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(id=name, tokens=(7,), finish=finish)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 1000, 100_000])
async def test_messages_are_whole_however_they_come(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [ipc.Events([event(name)]) for name in ("", "a", "bc" * 70, "x" * 700 * size, "end")]
    stream = framed(READY) + b"".join(map(framed, sent))

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in range(0, len(stream), size):
            writer.write(stream[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    client, seen = SocketEngineClient(str(tmp_path), Config()), list[ipc.Events]()
    monkeypatch.setattr(client, "_on_events", lambda message, _: seen.append(message))
    async with asyncio.timeout(20), await asyncio.start_unix_server(serve, ipc.address(str(tmp_path))):
        assert await client.ready() == READY
        while len(seen) < len(sent):
            await asyncio.sleep(0.001)
        await client.close()
    assert seen == sent


def test_a_process_hears_first_what_the_others_were_told(links: Links, tmp_path: Path) -> None:
    early = End(tmp_path)
    assert links.receive() == [], "the engine takes no links before it has something to say"
    links.send_first(READY)
    late = End(tmp_path)
    links.receive(1000)
    links.send_first(ipc.Failed("it broke"))
    for end, count in ((early, 2), (late, 2), (End(tmp_path), 1)):
        if count == 1:
            links.receive(1000)
        while len(end.seen) < count:
            end.read()
        assert end.seen == [READY, ipc.Failed("it broke")][-count:]
        end.socket.close()


def test_what_a_process_does_not_read_waits_for_it_and_holds_up_no_other(links: Links, tmp_path: Path) -> None:
    links.send_first(READY)
    slow, other = End(tmp_path), End(tmp_path)
    for end, name in ((slow, "slow"), (other, "other")):
        end.send(add(name))
    while len(links._owners) < 2:
        links.receive(1000)
    link = links._owners["slow"]
    replies = [ipc.Failed(f"{number:02}" * 25_000) for number in range(40)]  # far more than a socket holds
    for reply in replies:
        links.send(reply, link)
    links.send_events([event("slow"), event("other")])
    while len(other.seen) < 2:
        other.read()
    assert other.seen[1:] == [ipc.Events([event("other")])]
    while len(slow.seen) < 42:
        links.receive()
        slow.read()
    assert slow.seen == [READY, *replies, ipc.Events([event("slow")])]
    assert links._links[link].unsent == b""
    assert links.receive() == [], "what is read again is not waited for"
    for end in (slow, other):
        end.socket.close()


@pytest.mark.parametrize("behind", [False, True])
def test_the_requests_of_a_process_that_is_gone_are_named_once(behind: bool, links: Links, tmp_path: Path) -> None:
    links.send_first(READY)
    gone, stays = End(tmp_path), End(tmp_path)
    for end, names in ((gone, ("a", "b", "c")), (stays, ("d",))):
        for name in names:
            end.send(add(name))
    while len(links._owners) < 4:
        links.receive(1000)
    link = links._owners["a"]
    links.send_events([event("b", FinishReason.STOP)])
    if behind:
        links.send(ipc.Failed("x" * 2_000_000), link)
    gone.socket.close()
    assert links.receive(1000) == [(link, ipc.Abort(["a", "c"]))]
    assert links.receive() == []
    links.send(READY, link)
    links.send_events([event("a"), event("c"), event("d")])
    while len(stays.seen) < 2:
        stays.read()
    assert stays.seen[1:] == [ipc.Events([event("d")])]
    stays.socket.close()
