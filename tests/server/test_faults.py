"""What goes wrong: forward passes that fail, clients that vanish, an engine that hangs. Nothing may stay behind."""

import asyncio
import contextlib
import json
import random
import threading
import time
from pathlib import Path

import httpx
import pytest

from helpers.constraints import Cycle, cycle
from helpers.engine_thread import simulated
from helpers.invariants import check_cache
from helpers.serving import Serving, Web, raw_post
from helpers.simulation import VOCAB
from minisgl.core.engine import Engine
from minisgl.core.request_state import Constraint
from minisgl.core.types import FinishReason, Grammar, Request, SamplingParams, TokenEvent
from minisgl.errors import InvalidRequestError


def body(length: int, max_tokens: int, stream: bool, seed: int) -> dict[str, object]:
    """A request of random tokens that runs to its limit."""
    prompt = random.Random(seed).choices(range(8, VOCAB), k=length)
    return {"prompt": prompt, "max_tokens": max_tokens, "stream": stream, "ignore_eos": True, "seed": seed}


@pytest.mark.parametrize("n", range(1, 21))
async def test_an_exception_in_the_nth_forward_pass_is_told_to_all_who_wait(tmp_path: Path, n: int) -> None:
    async with asyncio.timeout(30), simulated(tmp_path, fail_at=n) as (side, thread):
        path = "/v1/completions"
        whole = [side.http.post(path, json=body(10, 60, False, i)) for i in range(3)]
        streams = [side.http.post(path, json=body(10, 60, True, i)) for i in range(3)]
        answers: list[httpx.Response] = await asyncio.gather(*whole, *streams)
        for answer in answers[:3]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        for answer in answers[3:]:
            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            told = json.loads(lines[-2]) if answer.status_code == 200 else answer.json()
            assert (told["error"]["code"], told["error"]["type"]) == ("engine_unavailable", "server_error")
            assert answer.status_code != 200 or lines[-1] == "[DONE]"
            assert answer.text.count('{"error"') == 1
        assert [(await side.http.get(path)).status_code for path in ("/health", "/ready")] == [503, 503]
        assert (await side.http.post(path, json=body(3, 1, False, 0))).status_code == 503
        assert (side.client.num_live, side.client.queue.requests, side.client.queue.tokens) == (0, 0, 0)
        assert thread.thread is not None
        await asyncio.to_thread(thread.thread.join, 10)  # it tells the clients before it ends
        assert str(thread.failure) == f"forward pass {n} failed, says the test"


async def vanish(side: Web, rng: random.Random, gate: asyncio.Semaphore) -> None:
    """Ask for an answer and leave after some of it, or before it begins."""
    async with gate:
        asked = body(rng.randint(1, 40), 80, rng.random() < 0.8, rng.randrange(1000))
        reader, writer = await side.connect(raw_post("/v1/completions", asked))
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(rng.choice((0, 0.01, 0.2))):
                for _ in range(rng.randint(0, 20)):
                    await reader.readuntil(b"data: ")
        if rng.random() < 0.5:
            writer.transport.abort()
        writer.close()


def nothing_left(side: Web, engine: Engine) -> bool:
    """Whether every count is back to zero."""
    client, queue = side.client, side.client.queue
    return not (client.num_live or queue.requests or queue.tokens or engine.scheduler.live or engine.cache.num_owned)


async def test_a_thousand_clients_that_vanish_leave_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    settings = {"num_pages": 200, "max_running_requests": 24, "max_prefill_length": 64}
    async with asyncio.timeout(200), simulated(tmp_path, **settings) as (side, thread):  # type: ignore[arg-type]
        gate = asyncio.Semaphore(32)
        await asyncio.gather(*(vanish(side, rng, gate) for _ in range(1000)))
        async with asyncio.timeout(30):
            while not nothing_left(side, thread.engine) or thread.engine.has_work:
                await asyncio.sleep(0.01)
        check_cache(thread.engine.cache)
        assert thread.engine.cache.available == 200
        answer = await side.http.post("/v1/completions", json=body(10, 5, False, 1))
        assert answer.json()["usage"]["completion_tokens"] == 5
        labels = {"finished_reason": "abort"}
        aborted = side.client.metrics.registry.get_sample_value("minisgl:request_success_total", labels)
        assert aborted is not None
        assert 200 < aborted <= 1000


async def test_nobody_waits_for_somebody_elses_grammar(tmp_path: Path) -> None:
    gate = threading.Event()

    def factory(grammar: Grammar) -> Constraint:
        assert gate.wait(20)
        raise InvalidRequestError(f"{grammar.source} cannot be followed")

    serving = simulated(tmp_path, constraints=factory)
    async with asyncio.timeout(30), serving as (side, thread):
        requests = [
            Request.make(id=name, prompt=[9, 10], params=SamplingParams(max_tokens=3, seed=1, grammar=grammar))
            for name, grammar in (("a", Grammar(kind="regex", source="x")), ("b", None))
        ]
        constrained, free = (side.client.submit([request]) for request in requests)
        with free:
            tokens = [token async for batch in free.batches() for e in batch.events for token in e.tokens]
            assert len(tokens) == 3
        assert (await side.client.ping(5)).waiting == 1
        gate.set()
        with constrained:
            (event,) = [e async for batch in constrained.batches() for e in batch.events]
        assert (event.finish, event.error) == (FinishReason.ERROR, "x cannot be followed")
        assert nothing_left(side, thread.engine)


async def test_a_request_aborted_while_its_grammar_is_compiled_never_runs(tmp_path: Path) -> None:
    begun, gate, done = threading.Event(), threading.Event(), threading.Event()

    def factory(grammar: Grammar) -> Constraint:
        begun.set()
        assert gate.wait(20)
        done.set()
        return Cycle(cycle(5, 100), VOCAB, eos=1)

    serving = simulated(tmp_path, constraints=factory)
    async with asyncio.timeout(30), serving as (side, thread):
        params = SamplingParams(max_tokens=50, grammar=Grammar(kind="regex", source="x"))
        with side.client.submit([Request.make(id="a", prompt=[9, 10], params=params)]):
            await asyncio.to_thread(begun.wait, 20)
        assert (await side.client.ping(5)).waiting == 0
        gate.set()
        await asyncio.to_thread(done.wait, 20)
        for _ in range(3):  # each is answered between two steps
            stats = await side.client.ping(5)
        assert (stats.running, stats.waiting, stats.prompt_tokens) == (0, 0, 0)
        assert nothing_left(side, thread.engine)


@pytest.mark.serving(health_timeout=0.1)
async def test_an_engine_that_hangs_turns_health_red_and_green_again(server: Serving) -> None:
    server.engine.deaf = True
    answer = await server.http.get("/health")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    server.engine.deaf = False
    for _ in range(5):
        assert (await server.http.get("/health")).json() == {"status": "ok", "running": 0, "waiting": 0}
    assert server.client._replies == {}, "no question is kept after its answer, or without one"


async def test_the_cache_is_flushed_of_what_nobody_uses(tmp_path: Path) -> None:
    async with asyncio.timeout(30), simulated(tmp_path, num_pages=100) as (side, thread):
        step = thread.engine.step

        def slow_step() -> list[TokenEvent]:
            time.sleep(0.002)  # so that a request is seen while it runs
            return step()

        thread.engine.step = slow_step  # type: ignore[method-assign]
        await side.http.post("/v1/completions", json=body(40, 2, False, 1))
        cached = thread.engine.cache.num_cached
        assert cached == 10
        running = asyncio.create_task(side.http.post("/v1/completions", json=body(20, 100, False, 2)))
        while not thread.engine.cache.num_owned:
            await asyncio.sleep(0.001)
        flushed = (await side.http.post("/flush_cache")).json()["flushed_pages"]
        assert flushed >= cached, "what the running request uses stays"
        assert (await running).json()["usage"]["completion_tokens"] == 100
        check_cache(thread.engine.cache)
        again = (await side.http.post("/v1/completions", json=body(40, 2, False, 1))).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
