"""The engine process: each API process gets its own events, and grammars are compiled beside the steps."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from helpers.constraints import Cycle, cycle
from helpers.engine_thread import EngineThread
from helpers.simulation import VOCAB, simulated_engine
from minisgl.config import Config
from minisgl.core.request_state import Constraint
from minisgl.core.types import FinishReason, Grammar, Request, SamplingParams, TokenEvent
from minisgl.errors import InvalidRequestError
from minisgl.server import ipc
from minisgl.server.engine_client import SocketEngineClient
from minisgl.server.engine_process import PendingGrammars
from minisgl.server.errors import RequestAbortedError
from minisgl.system import PrivateFolder


@pytest.fixture
async def clients() -> AsyncIterator[list[SocketEngineClient]]:
    """The launcher's client of a simulated engine, and those of two API processes."""
    engine = simulated_engine(max_seq_len=2000, num_pages=2000)
    with PrivateFolder() as folder:
        clients = [SocketEngineClient(folder, Config(), link=link) for link in range(3)]
        async with EngineThread(engine).start(folder):
            await clients[0].ready()
            for link in (1, 2):
                clients[0].send(ipc.Attach(link))
                assert (await clients[link].ready()).model == engine.model
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


async def test_the_requests_of_a_process_that_is_gone_are_aborted_and_others_go_on(
    clients: list[SocketEngineClient],
) -> None:
    launcher, lost, kept = clients
    going_on = [asyncio.create_task(answer(kept, request(f"kept-{i}", 400))) for i in range(3)]
    group = lost.submit([request(f"lost-{i}", 1900) for i in range(5)])
    not_begun = {f"lost-{i}" for i in range(5)}
    async for batch in group.batches():
        not_begun -= {event.id for event in batch.events}
        if not not_begun:  # what comes after the end of a link is not taken
            break
    lost.fail("it is dead")  # says nothing to the engine any more
    launcher.send(ipc.Detach(1))
    launcher.send(ipc.Detach(1))  # nothing is left to forget
    for events in await asyncio.gather(*going_on):
        assert sum(len(event.tokens) for event in events) == 400
    lost.dead = None
    lost.send(ipc.Add(request("late", 1900), 1))  # was on its way when its process died
    for _ in range(3):  # each is answered between two steps
        stats = await launcher.ping(5)
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


@pytest.mark.parametrize("error", [InvalidRequestError("too much"), RuntimeError("too much")])
def test_a_request_is_ready_when_its_grammar_is_and_never_when_it_has_left(error: Exception) -> None:
    gate, made = threading.Event(), Cycle(cycle(5, 100), VOCAB, eos=1)

    def factory(grammar: Grammar) -> Constraint:
        assert gate.wait(10)
        if grammar.source == "c":
            raise error
        return made

    pending = PendingGrammars(factory)
    for name in "abcd":
        grammar = Grammar(kind="regex", source=name)
        pending.start(Request.make(id=name, prompt=[1], params=SamplingParams(grammar=grammar)), grammar)
    assert pending.drop(["b", "a", "unknown"]) == ["b", "a"]
    assert (pending.ready(), list(pending.requests)) == ([], ["c", "d"])
    gate.set()
    deadline, found = time.monotonic() + 10, pending.ready()
    while len(found) < 2:
        assert time.monotonic() < deadline
        found += pending.ready()
    found.sort(key=lambda each: each[0].id)
    assert [request.id for request, _ in found] == ["c", "d"]
    with pytest.raises(InvalidRequestError, match="too much"):
        found[0][1].result()
    assert found[1][1].result() is made
    assert (pending.requests, pending.ready()) == ({}, [])
    pending.close()


def test_no_request_waits_for_the_grammar_of_another() -> None:
    gate, made = threading.Event(), Cycle(cycle(5, 100), VOCAB, eos=1)

    def factory(grammar: Grammar) -> Constraint:
        assert grammar.source != "slow" or gate.wait(10)
        return made

    pending = PendingGrammars(factory)
    for name in ("slow", "a", "b"):
        grammar = Grammar(kind="regex", source=name)
        pending.start(Request.make(id=name, prompt=[1], params=SamplingParams(grammar=grammar)), grammar)
    deadline, found = time.monotonic() + 10, pending.ready()
    while len(found) < 2:
        assert time.monotonic() < deadline
        found += pending.ready()
    assert ([request.id for request, _ in found], list(pending.requests)) == (["a", "b"], ["slow"])
    gate.set()
    while not pending.ready():
        assert time.monotonic() < deadline
    pending.close()
