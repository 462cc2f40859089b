"""What the server shows of the engine with `--debug-endpoints`, over a simulated device."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.constraints import cycle
from helpers.engine_thread import EngineThread, simulated
from helpers.serving import Serving, Web
from helpers.simulation import request, run, simulated_engine
from minisgl.core.radix_cache import Node
from minisgl.server.debug import KEPT, NODES, StepLog, snapshot, tree

PROMPT = list(range(8, 28))


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[tuple[Web, EngineThread]]:
    settings: dict[str, Any] = {"num_pages": 16, "max_running_requests": 2, "max_prefill_length": 16}
    async with simulated(tmp_path, flags={"debug_endpoints": True}, **settings) as running:
        yield running


async def complete(web: Web, count: int, **body: Any) -> None:
    body = {"max_tokens": 20, "ignore_eos": True, "temperature": 0, **body}
    posts = [web.http.post("/v1/completions", json={"prompt": [*PROMPT, 30 + i], **body}) for i in range(count)]
    for answer in await asyncio.gather(*posts):
        assert answer.status_code == 200, answer.text


async def read_steps(web: Web, count: int, begun: asyncio.Barrier) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    async with web.http.stream("GET", "/debug/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        await begun.wait()
        async for line in answer.aiter_lines():
            steps += [json.loads(line[6:])] if line.startswith("data: ") else []
            if len(steps) >= count:
                break
    return steps


async def test_a_viewer_of_an_idle_engine_has_its_answers_head(busy: tuple[Web, EngineThread]) -> None:
    async with asyncio.timeout(5), busy[0].http.stream("GET", "/debug/events") as answer:
        assert answer.status_code == 200


async def test_the_openapi_document_says_that_every_event_is_a_step(busy: tuple[Web, EngineThread]) -> None:
    found = (await busy[0].http.get("/openapi.json")).json()
    content = found["paths"]["/debug/events"]["get"]["responses"]["200"]["content"]
    (event,) = content.pop("text/event-stream")["schema"]["properties"]["data"]["anyOf"]  # and never [DONE]
    assert event["contentSchema"] == {"anyOf": [{"$ref": "#/components/schemas/StepRecord"}]}
    assert "pages_free" in found["components"]["schemas"]["StepRecord"]["properties"]
    assert not content
    assert "application/json" in found["paths"]["/debug/engine"]["get"]["responses"]["200"]["content"]


async def test_a_viewer_gets_every_step_and_another_the_same(busy: tuple[Web, EngineThread]) -> None:
    web, _ = busy
    begun = asyncio.Barrier(3)
    viewers = [asyncio.create_task(read_steps(web, 20, begun)) for _ in range(2)]
    await begun.wait()
    await complete(web, 3)
    first, second = await asyncio.gather(*viewers)
    assert first == second
    numbers = [step["step"] for step in first]
    assert numbers == list(range(numbers[0], numbers[0] + 20))
    assert sum(len(step["admitted"]) for step in first) >= 1
    for step in first:
        assert step["planned"] <= step["launched"] <= step["sent"] <= step["awaited"] <= step["arrived"]


def test_a_viewer_that_lags_loses_the_oldest_steps() -> None:
    engine, log = simulated_engine(max_running_requests=1), StepLog()
    engine.observers.append(log)
    run(engine, [request(str(number), PROMPT, max_tokens=60, ignore_eos=True) for number in range(10)])
    last, events = log.after(0)
    numbers = [json.loads(event.removeprefix(b"data: "))["step"] for event in events.split(b"\n\n")[:-1]]
    assert numbers == list(range(last - KEPT + 1, last + 1))
    assert log.after(last) == (last, b"")


async def test_the_snapshot_names_requests_pages_and_why_they_wait(busy: tuple[Web, EngineThread]) -> None:
    web, _ = busy
    await complete(web, 1)
    shown = (await web.http.get("/debug/engine")).json()
    assert (shown["counts"], shown["running"], shown["waiting"]) == ({"running": 0, "waiting": 0}, [], [])
    assert shown["pages"]["free"] + shown["pages"]["cached"] + shown["pages"]["owned"] == 16
    (top,) = shown["tree"]["children"]
    runs = [top]
    for node in runs:
        runs += node["children"]
    assert sum(node["pages"] for node in runs) == shown["pages"]["cached"] > 0
    assert (len(runs), {node["locks"] for node in runs}) == (shown["tree"]["nodes"], {0})
    assert [step["step"] for step in shown["recent"]] == list(range(1, shown["step"] + 1))


def test_the_states_of_rows_are_named() -> None:
    engine = simulated_engine(num_pages=400, max_seq_len=200, max_running_requests=40, max_prefill_length=20)
    for i in range(30):
        engine.add(request(str(i), [i] * 30, max_tokens=9, ignore_eos=True, grammar=cycle(3, 9, 2)))
    seen = set()
    while engine.has_work:
        engine.step()
        seen |= {row["state"] for row in json.loads(snapshot(engine, [], []))["running"]}
    assert seen >= {"prefill", "decode", "held"}


def test_the_reasons_are_those_of_the_scheduler() -> None:
    engine = simulated_engine(num_pages=12, max_running_requests=2, max_prefill_length=16)
    for name in ("a", "b", "c"):
        engine.add(request(name, [*PROMPT, ord(name) % 50], max_tokens=20, ignore_eos=True))
    for _ in range(4):
        engine.step()
    shown = json.loads(snapshot(engine, ["g"], []))
    assert [row["id"] for row in shown["running"]] == ["a", "b"]
    assert all(row["pages"] >= row["borrowed_pages"] > 0 for row in shown["running"])
    assert [(row["id"], row["why"]) for row in shown["waiting"]] == [
        ("c", "all 2 rows are taken"),
        ("g", "its grammar is being compiled"),
    ]
    engine = simulated_engine(num_pages=8, max_running_requests=4, max_prefill_length=16)
    for name, prompt in (("a", PROMPT), ("b", PROMPT[::-1])):
        engine.add(request(name, prompt, max_tokens=4, ignore_eos=True))
    engine.step()
    (waiting,) = json.loads(snapshot(engine, [], []))["waiting"]
    assert waiting["why"].startswith("its prompt and a decode need 6 pages beside those that are cached, ")


def test_a_large_tree_is_cut_and_says_so() -> None:
    root = Node(np.empty(0, np.int32), np.empty(0, np.int32), None)
    node = root
    for number in range(NODES + 5):
        page = np.array([number], np.int32)
        node.children[page.tobytes()] = node = Node(page, page, node)
    shown = tree(root)
    assert (shown["nodes"], shown["left_out"]) == (NODES, 1)


async def test_nothing_that_a_client_sends_is_a_fault_of_the_server(busy: tuple[Web, EngineThread]) -> None:
    web, _ = busy
    rng, characters = random.Random(0), "/?&=%~é0aZ:;#"
    for _ in range(200):
        noise = "".join(rng.choices(characters, k=rng.randint(0, 12)))
        path = f"/debug/{rng.choice(('engine', 'event', ''))}{rng.choice(('', '?', '/'))}{noise}"
        method = rng.choice(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"))
        answer = await web.http.request(method, path, content=rng.randbytes(rng.randint(0, 40)))
        assert answer.status_code in (200, 307, 400, 403, 404, 405, 415), (method, path, answer.text)
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert (await web.http.request(method, "/debug/events", content=b"{}")).status_code == 405
    await complete(web, 1)


@pytest.mark.serving(debug_endpoints=True, api_key=("hush-hush",))
async def test_the_key_is_asked_for(server: Serving) -> None:
    for path in ("/debug/engine", "/debug/events"):
        assert (await server.http.get(path)).status_code == 401


async def test_without_the_switch_there_is_nothing(server: Serving) -> None:
    for path in ("/debug/engine", "/debug/events"):
        assert (await server.http.get(path)).status_code == 404
