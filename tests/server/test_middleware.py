"""What every request passes: keys, CORS, the request's id and its line in the log."""

import asyncio
import hmac
import itertools
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from helpers.serving import Serving
from minisgl.config import Config
from minisgl.server.api_process import KeyGuard, with_middleware
from minisgl.server.app import NamedRoute
from minisgl.server.metrics import Metrics

TEXT: dict[str, Any] = {"prompt": "hello there", "max_tokens": 3}
GUARDED = "/v1/models /metrics /server_info /model_info /version /v1/completions /abort_request /flush_cache /nothing"


@pytest.mark.serving(api_key=("one", "two"))
async def test_a_key_is_asked_for_everywhere_but_at_the_load_balancers_endpoints(server: Serving) -> None:
    wrong = (b"Bearer wrong", b"Basic one", b"one", b"Bearer onetwo", b"Bearer \xff\xfe")
    for path, method in itertools.product(GUARDED.split(), ("GET", "POST")):
        for headers in ({}, *({b"Authorization": value} for value in wrong)):
            answer = await server.http.request(method, path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"] == "Bearer"
    assert server.engine.seen == []
    for path in ("/health", "/ready"):
        assert (await server.http.get(path)).status_code == 200
    for key in ("one", "two"):
        answer = await server.http.post("/v1/completions", json=TEXT, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = KeyGuard(lambda *_: None, ["one", "two", "three"])  # type: ignore[arg-type]
    for key, number in (("one", 1), ("three", 3), ("o", 0), ("", 0)):
        compared.clear()
        assert guard.key_number(Headers({"authorization": f"Bearer {key}"})) == number
        assert len(compared) == 3, "all keys are compared, whichever is right"
        assert {(len(a), len(b)) for a, b in compared} == {(32, 32)}, "lengths do not show"


@pytest.mark.serving(cors_origins=("https://a.example",), api_key=("secret",))
async def test_only_the_origins_named_may_call_from_a_web_page(server: Serving) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    good = await server.http.options("/v1/completions", headers={"Origin": "https://a.example", **ask})
    assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, "https://a.example")
    bad = await server.http.options("/v1/completions", headers={"Origin": "https://b.example", **ask})
    assert bad.status_code == 400
    assert "access-control-allow-origin" not in bad.headers
    refused = await server.http.get("/v1/models", headers={"Origin": "https://a.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example", "the page may read why"


async def test_without_origins_no_web_page_is_let_in(server: Serving) -> None:
    answer = await server.http.get("/v1/models", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_a_request_has_an_id_its_own_or_the_clients(server: Serving) -> None:
    mine = await server.http.post("/v1/completions", json=TEXT, headers={"X-Request-Id": "trace-7"})
    assert mine.headers["x-request-id"] == "trace-7"
    for bad in ("", "x" * 200, "a b"):
        answer = await server.http.get("/version", headers={"X-Request-Id": bad})
        assert len(answer.headers["x-request-id"]) == 32
    assert len((await server.http.get("/nowhere")).headers["x-request-id"]) == 32


async def test_each_request_has_one_line_in_the_log(server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "minisgl")
    prompt = server.tokenizer.encode(TEXT["prompt"])
    for stream in (False, True):
        body = {**TEXT, "stream": stream}
        await server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "abc"})
    await server.http.post("/v1/completions", json={"prompt": ""})
    await server.http.get("/health")
    lines = [r.getMessage() for r in caplog.records if r.name == "minisgl.access"]
    assert len(lines) == 3, lines
    for line in lines[:2]:
        assert '"POST /v1/completions" 200 id=abc ' in line
        assert f"prompt={len(prompt)} cached={len(prompt) // 2} generated=3 queue=" in line
        assert "ttft=" in line
        assert "finish=length total=" in line
    assert '"POST /v1/completions" 400 id=' in lines[2]
    assert "prompt=" not in lines[2]
    assert TEXT["prompt"] not in "".join(lines), "what users write is not logged"


async def test_head_is_answered_as_get_without_the_body(server: Serving) -> None:
    for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/completions", 405), ("/nothing/here", 404)):
        head, got = await server.http.head(path), await server.http.get(path)
        assert (head.status_code, head.content) == (status, b"")
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))
    counts = (await server.http.get("/metrics")).text
    found = [line for line in counts.splitlines() if 'method="HEAD"' in line]
    assert [line.rpartition(" ")[2] for line in found if '"/health"' in line] in (["1"], ["1.0"])
    assert all('"unmatched"' in line for line in found if 'status="404"' in line)


def test_a_head_whose_endpoint_fails_is_counted_under_its_route() -> None:
    async def broken(_: Request) -> Response:
        raise RuntimeError("a fault of ours")

    app, metrics = Starlette(routes=[NamedRoute("/broken", broken)]), Metrics()

    async def ask() -> None:
        transport = httpx.ASGITransport(with_middleware(app, metrics, Config()), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method in ("HEAD", "GET"):
                assert (await client.request(method, "/broken")).status_code == 500

    asyncio.run(ask())
    for method in ("HEAD", "GET"):
        labels = {"method": method, "route": "/broken", "status": "500"}
        assert metrics.registry.get_sample_value("minisgl:http_requests_total", labels) == 1


async def test_a_response_is_counted_before_its_client_has_it() -> None:
    metrics, counts = Metrics(), []
    labels = {"method": "GET", "route": "unmatched", "status": "200"}

    async def send(message: Message) -> None:
        counts.append(metrics.registry.get_sample_value("minisgl:http_requests_total", labels))

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    await with_middleware(Response("hello"), metrics, Config())(scope, AsyncMock(), send)
    assert counts == [1, 1]
