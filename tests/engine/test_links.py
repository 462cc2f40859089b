"""Several API processes at one engine: each gets its own events, and one that is gone leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from helpers.engine_thread import EngineThread
from helpers.simulation import simulated_engine
from minisgl.build import Built
from minisgl.core.engine import Engine
from minisgl.core.types import FinishReason, Request, SamplingParams, TokenEvent
from minisgl.engine import process
from minisgl.engine.messages import Add, Attach, Detach
from minisgl.server.child import socket_folder
from minisgl.server.limits import Limits, Queue
from minisgl.server.service import EngineService


@contextlib.asynccontextmanager
async def linked(engine: Engine, folder: Path, count: int) -> AsyncIterator[list[EngineService]]:
    """The parent's service, and those of so many API processes."""
    services = [EngineService(f"ipc://{folder}/t0", f"ipc://{folder}/f0")]
    try:
        async with EngineThread(engine).start(f"ipc://{folder}/t0", f"ipc://{folder}/f0"):
            await services[0].ready()
            for link in range(1, count + 1):
                here, there = f"ipc://{folder}/t{link}", f"ipc://{folder}/f{link}"
                services.append(EngineService(here, there, Queue(Limits()), link))
                services[0].send(Attach(link, here, there))
                assert (await services[link].ready()).model == engine.model
            yield services
    finally:
        for service in services:
            await service.close()


def run(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[Engine, list[EngineService]], Awaitable[None]], count: int = 2
) -> None:
    engine = simulated_engine(max_seq_len=2000, num_pages=2000)
    monkeypatch.setattr(process, "build_engine", lambda config, **options: Built(engine, Path("/nowhere"), ()))

    async def main() -> None:
        folder = socket_folder()
        async with asyncio.timeout(60), linked(engine, folder, count) as services:
            await check(engine, services)

    asyncio.run(main())


def request(name: str, max_tokens: int) -> Request:
    return Request.make(id=name, prompt=[5] * 40, params=SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def answer(service: EngineService, asked: Request) -> list[TokenEvent]:
    with service.submit([asked]) as submission:
        return [event async for batch in submission.batches() for event in batch]


def test_every_process_gets_the_events_of_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(engine: Engine, services: list[EngineService]) -> None:
        asked = [(link, request(f"{link}-{i}", 10 + i)) for i in range(8) for link in (0, 1, 2)]
        answers = await asyncio.gather(*(answer(services[link], one) for link, one in asked))
        for (_, one), events in zip(asked, answers, strict=True):
            assert {event.id for event in events} == {one.id}
            assert sum(len(event.tokens) for event in events) == one.params.max_tokens
            assert [event.finish for event in events if event.finish] == [FinishReason.LENGTH]
        for service in services:
            assert service.metrics.queue_time.count == 8
            stats = await service.ping(5)
            assert (stats.running, stats.waiting, stats.generated_tokens) == (0, 0, 3 * sum(range(10, 18)))

    run(monkeypatch, check)


def test_the_requests_of_a_process_that_is_gone_are_aborted_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(engine: Engine, services: list[EngineService]) -> None:
        parent, lost, kept = services
        going_on = [asyncio.create_task(answer(kept, request(f"kept-{i}", 400))) for i in range(3)]
        submission = lost.submit([request(f"lost-{i}", 1900) for i in range(5)])
        not_begun = {f"lost-{i}" for i in range(5)}
        async for batch in submission.batches():
            not_begun -= {event.id for event in batch}
            if not not_begun:  # what comes after the end of a link is not taken
                break
        lost.fail("it is dead")  # says nothing to the engine any more
        parent.send(Detach(1))
        while (await parent.ping(5)).running > 3:
            await asyncio.sleep(0.01)
        for events in await asyncio.gather(*going_on):
            assert sum(len(event.tokens) for event in events) == 400
        lost.dead = None
        lost.send(Add(request("late", 1900), 1))  # was on its way when its process died
        stats = await parent.ping(5)
        await asyncio.sleep(0.1)
        stats = await parent.ping(5)
        assert (stats.running, stats.waiting, stats.aborted) == (0, 0, 5)
        assert stats.pages_free + stats.pages_cached == stats.pages_total

    run(monkeypatch, check)


def test_a_process_that_comes_later_is_served_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(engine: Engine, services: list[EngineService]) -> None:
        services[0].send(Detach(1))
        services[0].send(Detach(1))  # nothing is left to forget
        events = await answer(services[2], request("a", 7))
        assert sum(len(event.tokens) for event in events) == 7

    run(monkeypatch, check)
