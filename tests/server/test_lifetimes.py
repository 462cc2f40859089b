import asyncio
from typing import Any

import pytest

from helpers.serving import Serving, raw_post
from minisgl.core.types import FinishReason, Request, SamplingParams, TokenEvent
from minisgl.errors import EngineDeadError

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 100}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.serving(delay=0.02)
async def test_a_client_that_leaves_ends_its_requests(server: Serving, path: str, stream: bool) -> None:
    body = LONG if path == CHAT else {"prompt": ["a b c", "d e f"], "max_tokens": 100}
    count = 1 if path == CHAT else 2
    reader, writer = await server.connect(raw_post(path, {**body, "stream": stream}))
    if stream:
        await reader.readuntil(b"data: ")
    await server.until(lambda: len(server.engine.live) == count)
    writer.close()
    await server.until(lambda: not server.engine.live, timeout=1.0)
    assert (len(server.engine.aborted), server.client.num_live) == (count, 0)
    assert (await server.http.post(path, json={**body, "max_tokens": 2})).status_code == 200


@pytest.mark.serving(delay=1.0)
async def test_a_client_that_leaves_before_the_first_token_ends_its_request(server: Serving) -> None:
    _, writer = await server.connect(raw_post(CHAT, {**LONG, "stream": True}))
    await server.until(lambda: len(server.engine.live) == 1)
    writer.close()
    await server.until(lambda: bool(server.engine.aborted), timeout=1.0)


async def test_an_engine_that_is_gone_is_noticed_at_once(server: Serving) -> None:
    server.engine.hang_up()
    await server.until(server.client.gone.is_set)
    assert (await server.http.post(CHAT, json=LONG)).status_code == 503
    assert isinstance(server.client.dead, EngineDeadError)


@pytest.mark.serving(delay=0.002)
async def test_aborting_keeps_what_belongs_to_others_and_drops_the_rest(server: Serving) -> None:
    requests = [Request.make(id=i, prompt=[5, 6, 7], params=SamplingParams(max_tokens=50)) for i in "ab"]
    events: list[TokenEvent] = []
    with server.client.submit(requests) as submission:
        async for batch in submission.batches():
            events += batch.events
            if len(events) > 10:
                submission.abort("a")
    tokens = {i: [t for e in events if e.id == i for t in e.tokens] for i in "ab"}
    assert len(tokens["b"]) == 50
    assert len(tokens["a"]) < 50
    assert [e.finish for e in events if e.finish is not None] == [FinishReason.LENGTH]
    await server.until(lambda: server.engine.aborted == ["a"])


async def test_a_slow_tokenisation_does_not_stop_other_streams(server: Serving) -> None:
    """The event loop stays free while a long prompt is tokenised."""
    words = "word " * 400_000
    body = {"prompt": words, "max_tokens": 1}
    slow = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await asyncio.sleep(0)
    gaps = []
    while not slow.done():
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(0.001)
        gaps.append(asyncio.get_running_loop().time() - before)
    assert (await slow).json()["error"]["code"] == "context_length_exceeded"
    assert max(gaps) < 0.5


async def test_chunked_bodies_without_a_length_are_limited_too(server: Serving) -> None:
    async def body() -> Any:
        for _ in range(17):
            yield b" " * 2**20

    response = await server.http.post(CHAT, content=body())
    assert response.status_code == 413


async def test_an_offer_of_http2_is_passed_over_in_silence(server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    # As Java's client does by default, with the body of every request.
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
    answer = await server.http.post(CHAT, json={**LONG, "max_tokens": 2}, headers=offer)
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
