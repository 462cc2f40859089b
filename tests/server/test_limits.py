"""What bounds a server: its queue, the time of a request, the size of a head, readers and writers that stall."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from helpers.serving import Serving, raw_post, serving
from minisgl.config import Config
from minisgl.core.types import Request, SamplingParams
from minisgl.server import api_process
from minisgl.server.api_process import HttpServer
from minisgl.server.engine_client import Queue
from minisgl.server.errors import OverloadedError, QueueFullError
from minisgl.server.metrics import Metrics

TEXT: dict[str, Any] = {"prompt": "hello there", "max_tokens": 3}


KEYS = ("one", "two", "three")
# Who may ask for which priority: settings, the client's key, the priority, and the one it gets, None for a 400.
PRIORITIES: list[tuple[dict[str, Any], str, int, int | None]] = [
    *(({}, "", asked, 0) for asked in (-(2**31), -1, 0, 7, 2**31 - 1)),  # by default it is ignored
    *(({"client_priorities": ("0:9",)}, "", asked, got) for asked, got in ((0, 0), (9, 9), (10, None), (-1, None))),
    *(({"client_priorities": ("0:0",)}, "", asked, got) for asked, got in ((0, 0), (1, None), (-(2**31), None))),
    *(
        ({"client_priorities": ("2=-5:5", "1:3"), "api_key": KEYS}, key, asked, got)
        for key, asked, got in (
            ("one", 1, 1), ("one", -5, None), ("two", -5, -5), ("two", 6, None), ("three", 3, 3), ("three", 0, None),
        )
    ),
    *(
        ({"client_priorities": ("3=-9:-9",), "api_key": KEYS}, key, asked, got)
        for key, asked, got in (("one", -9, 0), ("two", 5, 0), ("three", -9, -9), ("three", 0, None))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "key", "asked", "got"), PRIORITIES)
async def test_a_priority_counts_within_the_range_of_the_clients_key(
    settings: dict[str, Any], key: str, asked: int, got: int | None, tmp_path: Path
) -> None:
    async with serving(tmp_path, **settings) as server:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        bodies = {
            "/v1/chat/completions": chat,
            "/v1/completions": {**TEXT, "n": 2},
            "/generate": {"text": "hi", "sampling_params": {"max_new_tokens": 1}},
        }
        for path, body in bodies.items():
            answer = await server.http.post(path, json={**body, "priority": asked}, headers=headers)
            if got is None:
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (400, "priority", "invalid_value")
                assert f"got {asked}" in error["message"]
            else:
                assert answer.status_code == 200, answer.text
            assert (await server.http.post(path, json=body, headers=headers)).status_code == 200
        seen = [request.priority for request in server.engine.seen]
        assert seen == ([0, 0, 0, 0] if got is None else [got, 0, got, got, 0, 0, got, 0])


def requests(count: int, tokens: int = 10) -> list[Request]:
    return [Request.make(id=str(i), prompt=[5] * tokens, params=SamplingParams()) for i in range(count)]


def test_the_queue_takes_what_its_limits_allow_and_no_more() -> None:
    queue = Queue(Config(max_queued_requests=2, max_queued_tokens=30), Metrics(), 8)
    queue.check(requests(3), 0)  # nothing waits: whatever the server can keep
    queue.change(1, 10)
    queue.check(requests(1), 1)
    with pytest.raises(QueueFullError, match="1 requests with 10 prompt tokens are waiting"):
        queue.check(requests(2), 1)
    with pytest.raises(QueueFullError, match="1 requests with 10 prompt tokens are waiting"):
        queue.check(requests(1, tokens=21), 1)
    queue.change(-1, -10, waited=3.0)
    assert (queue.requests, queue.tokens) == (0, 0)
    with pytest.raises(OverloadedError, match="8 requests are live"):
        queue.check(requests(1), 8)


def test_who_is_turned_away_is_told_to_wait_as_long_as_others_did() -> None:
    queue = Queue(Config(max_queued_requests=1), Metrics())
    for waited, retry_after in ((0.0, 1), (4.0, 4), (1e6, 60)):
        for _ in range(50):
            queue.change(1, 1)
            queue.change(-1, -1, waited=waited)
        queue.change(1, 1)
        with pytest.raises(QueueFullError) as error:
            queue.check(requests(1), 1)
        assert error.value.retry_after == retry_after
        queue.change(-1, -1)


@pytest.mark.parametrize("limit", [{"max_queued_requests": 2}, {"max_queued_tokens": 20}, {"max_live": 2}])
async def test_a_full_server_turns_requests_away_and_takes_them_again_later(
    tmp_path: Path, limit: dict[str, int]
) -> None:
    status, code = (503, "overloaded") if "max_live" in limit else (429, "queue_full")
    async with serving(tmp_path, delay=0.3, **limit) as server:
        body = {"prompt": [5] * 10, "max_tokens": 2}
        waiting = [asyncio.create_task(server.http.post("/v1/completions", json=body)) for _ in range(2)]
        await server.until(lambda: server.client.queue.requests == 2)
        answer = await server.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        page = (await server.http.get("/metrics")).text
        assert f'request_rejected_total{{model_name="stub-model",reason="{code}"}} 1.0' in page
        assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
        assert (server.client.queue.requests, server.client.queue.tokens) == (0, 0)
        assert (await server.http.post("/v1/completions", json=body)).status_code == 200


@pytest.mark.serving(delay=0.02, request_timeout=0.8)
async def test_a_request_that_takes_too_long_ends_with_504_and_frees_what_it_held(server: Serving) -> None:
    body = {"prompt": "hello there", "max_tokens": 100}
    answer = await server.http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    stream = await server.http.post("/v1/completions", json={**body, "stream": True})
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert stream.status_code == 200
    assert len(events) > 2
    assert events[-1]["error"]["code"] == "request_timeout"
    assert stream.text.endswith("data: [DONE]\n\n")
    await server.until(lambda: not server.engine.live)
    assert (len(server.engine.aborted), server.client.num_live) == (2, 0)
    page = (await server.http.get("/metrics")).text
    assert 'request_success_total{finished_reason="timeout",model_name="stub-model"} 2.0' in page
    assert (await server.http.post("/v1/completions", json={**body, "max_tokens": 2})).status_code == 200


async def test_a_head_without_an_end_is_refused(server: Serving) -> None:
    reader, writer = await server.connect(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * (api_process.HEAD_LIMIT * 8))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 "), head
    writer.close()
    assert (await server.http.get("/version")).status_code == 200


@pytest.mark.parametrize("before", [b"", b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize(("length", "status"), [(api_process.HEAD_LIMIT, b"200"), (api_process.HEAD_LIMIT + 1, b"431")])
async def test_a_head_is_refused_by_its_size_however_it_comes(
    server: Serving, before: bytes, length: int, status: bytes
) -> None:
    start, end = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Long: ", b"\r\n\r\n"
    head = start + b"a" * (length - len(start) - len(end)) + end
    for pieces in ([before + head], [before + head[:100], head[100:]]):
        reader, writer = await server.connect(*pieces)
        answer = await reader.read()
        assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [*([b"200"] if before else []), status]
        assert (b"headers_too_large" in answer) == (status == b"431")
        writer.close()


def test_a_head_leaves_with_the_first_part_of_its_body() -> None:
    connection = api_process.BoundedConnection(h11.SERVER, api_process.HEAD_LIMIT)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert [type(connection.next_event()) for _ in range(2)] == [h11.Request, h11.EndOfMessage]
    assert connection.send(h11.Response(status_code=200, headers=[])) == b""
    first = connection.send(h11.Data(data=b"one"))
    assert (first[:15], first[-12:]) == (b"HTTP/1.1 200 \r\n", b"\r\n\r\n3\r\none\r\n")
    assert connection.send(h11.Data(data=b"two")) == b"3\r\ntwo\r\n"
    assert connection.send(h11.EndOfMessage()) == b"0\r\n\r\n"


async def test_what_is_not_http_is_answered_in_openais_form(server: Serving) -> None:
    reader, writer = await server.connect(b"\x16\x03\x01 hello\r\n\r\n")
    answer = await reader.read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    writer.close()


@pytest.mark.parametrize(
    "data",
    [b"", b"POST /v1/comp", raw_post("/v1/completions", {"prompt": "hello"})[:-9]],
    ids=["nothing", "half a head", "half a body"],
)
async def test_a_client_that_falls_silent_is_cut_off(
    server: Serving, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_process, "READ_TIMEOUT", 0.2)
    reader, writer = await server.connect(data)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()


@pytest.mark.serving(delay=0.04)
async def test_a_client_that_works_slowly_is_not_cut_off(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_process, "READ_TIMEOUT", 0.2)
    answer = await server.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 20})
    assert answer.status_code == 200, "generating took longer than a client may be silent"
    assert (await server.http.get("/version")).status_code == 200


@contextlib.asynccontextmanager
async def serving_app(app: ASGIApp, write_timeout: float = 30.0) -> AsyncIterator[int]:
    """Any application under the server's own protocol; the port."""
    listening = asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(app, listening.set, Config(write_timeout=write_timeout))
    running = asyncio.create_task(server.serve([listener]))
    await listening.wait()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


def test_idle_connections_are_kept_for_longer_than_clients_and_proxies_keep_them() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    # nginx and the load balancers of AWS use a connection again for up to 60 s, httpx and OpenAI's client for 5 s.
    assert HttpServer(app, lambda: None, Config()).config.timeout_keep_alive > 60


async def test_a_client_that_reads_on_after_a_pause_is_not_cut_off() -> None:
    sizes, resumed = (2**23, 10), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"8388618")]})
        await send({"type": "http.response.body", "body": b"x" * sizes[0], "more_body": True})  # until it is read
        resumed.set()
        await asyncio.sleep(0.6)  # twice the timeout
        await send({"type": "http.response.body", "body": b"x" * sizes[1]})

    async with asyncio.timeout(30), serving_app(app, write_timeout=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert not resumed.is_set()
        assert len((await reader.read(-1)).partition(b"\r\n\r\n")[2]) == sum(sizes)
        writer.close()


async def test_a_client_is_not_cut_off_while_the_server_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_process, "READ_TIMEOUT", 0.2)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.6)  # three times the timeout
        size, more = 0, True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            size, more = size + len(message["body"]), message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-size", str(size).encode())]})
        await send({"type": "http.response.body"})

    async with asyncio.timeout(30), serving_app(app) as port, httpx.AsyncClient() as client:
        answer = await client.post(f"http://127.0.0.1:{port}/", content=b"x" * 2**22)
        assert answer.headers["x-size"] == str(2**22)


@pytest.mark.serving(write_timeout=0.5, max_seq_len=40000)
async def test_a_client_that_does_not_read_its_answer_frees_its_pages(server: Serving) -> None:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, ("127.0.0.1", server.port))
    body = {"prompt": ["hello there"] * 8, "max_tokens": 30_000, "stream": True}
    await loop.sock_sendall(slow, raw_post("/v1/completions", body))
    await server.until(lambda: server.client.num_live == 8)
    for _ in range(5):
        await loop.sock_recv(slow, 1)  # a byte now and then is no reading
        await asyncio.sleep(0.05)
    await server.until(lambda: server.client.num_live == 0, timeout=30)
    await server.until(lambda: not server.engine.live)
    assert len(server.engine.aborted) == 8
    assert max(server.engine.given.values()) < 30_000
    slow.close()
    assert (await server.http.post("/v1/completions", json=TEXT)).status_code == 200


@pytest.mark.serving(delay=0.02)
async def test_a_draining_server_finishes_what_it_has_and_refuses_the_rest(server: Serving) -> None:
    body = {"prompt": "hello there", "max_tokens": 40}
    running = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await server.until(lambda: server.client.num_live == 1)
    draining = asyncio.create_task(server.client.drain())
    await asyncio.sleep(0)
    for path, method in (("/v1/completions", "POST"), ("/ready", "GET")):
        refused: httpx.Response = await server.http.request(method, path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"] == "5"
    assert (await server.http.get("/health")).status_code == 200
    assert not draining.done()
    assert (await running).json()["usage"]["completion_tokens"] == 40
    await asyncio.wait_for(draining, 5)
