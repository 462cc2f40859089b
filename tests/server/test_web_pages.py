"""What a web page that nobody meant to let in can reach: Host, Origin, content types; and corners of RFC 9112."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from helpers.serving import Serving, serving
from minisgl.config import Config, check
from minisgl.errors import ConfigError
from minisgl.server.admin import admin_routes
from minisgl.server.api_process import HostGuard
from minisgl.server.app import model_routes

TEXT: dict[str, Any] = {"prompt": "hello there", "max_tokens": 3}
PATHS = ("/", "/health", "/v1/models", "/metrics", "/nothing")
OWN_HOSTS = ("localhost", "LOCALHOST:1919", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:1919", "localhost:")
FOREIGN_HOSTS = (
    "evil.example", "evil.example:1919", "", "x", "localhost.evil.example", "evil-localhost", "127.0.0.1.nip.io",
    "127.0.0.2", "10.0.0.1", "0.0.0.0", "[::2]", "::1", "[::1", "localhost:x", "user@localhost",
    "localhost, evil.example", "m\xfcller",
)  # fmt: skip


async def status(server: Serving, host: str, path: str = "/v1/models", method: str = "GET") -> int:
    answer = await server.http.request(method, path, headers={b"Host": host.encode("latin-1")})
    if answer.status_code == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-hosts" in answer.json()["error"]["message"]
    return answer.status_code


async def test_without_a_key_the_host_is_a_name_of_this_machine(server: Serving) -> None:
    for host in OWN_HOSTS:
        assert await status(server, host) == 200, host
    for host in FOREIGN_HOSTS:
        assert await status(server, host) == 403, host
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS"):
            assert await status(server, "evil.example", path, method) == 403, path
    reader, writer = await server.connect(b"GET /health HTTP/1.0\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"200", "no web page speaks HTTP/1.0"
    writer.close()


@pytest.mark.serving(allowed_hosts=("a.example", "*.B.example", "[fe80::1]"))
async def test_more_names_can_be_allowed(server: Serving) -> None:
    for host in (*OWN_HOSTS, "a.example", "A.example:80", "x.b.example", "[FE80::1]:80"):
        assert await status(server, host) == 200, host
    for host in (*FOREIGN_HOSTS, "b.example", "xb.example", "x.a.example"):
        assert await status(server, host) == 403, host


@pytest.mark.parametrize(
    ("settings", "checked"),
    [
        ({}, True), ({"api_key": ("k",)}, False), ({"allow_public": True}, False), ({"allowed_hosts": ("*",)}, False),
        ({"allowed_hosts": ("a", "*"), "api_key": ("k",)}, False), ({"allowed_hosts": ("a",), "api_key": ("k",)}, True),
        ({"allowed_hosts": ("a",), "allow_public": True}, True),
    ],
)  # fmt: skip
async def test_the_host_is_checked_where_it_protects_or_is_asked_for(
    tmp_path: Path, settings: dict[str, Any], checked: bool
) -> None:
    async with serving(tmp_path, **settings) as server:
        assert await status(server, "evil.example", "/health") == (403 if checked else 200)
        assert await status(server, "localhost", "/health") == 200


async def test_a_name_that_the_server_was_told_to_listen_on_is_its_own() -> None:
    for host, own in (("127.0.0.2", "127.0.0.2:80"), ("::1", "[::1]:80"), ("box.local", "BOX.local")):
        assert HostGuard(lambda *_: None, Config(host=host)).allows(own)  # type: ignore[arg-type]


def test_allowed_hosts_are_names() -> None:
    check(Config(allowed_hosts=("a", "a.b", "*.a.b", "*", "1.2.3.4", "[::1]", "a_b-c")))
    for bad in ("a:80", "http://a", "a/b", "::1", "", "a.*", "a b"):
        with pytest.raises(ConfigError, match="--allowed-hosts takes names"):
            check(Config(allowed_hosts=(bad,)))


JSON_TYPES = (
    "application/json", "application/json; charset=utf-8", "Application/JSON", "text/json", "application/problem+json",
    "application/json ;x=y",
)  # fmt: skip
OTHER_TYPES = (
    None, "", "text/plain", "text/plain; charset=application/json", "text/plain;json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=json", "application/jsonp", "application/octet-stream", "json",
    "application/json, text/plain",
)  # fmt: skip


def body_paths(server: Serving) -> list[str]:
    nothing = SimpleNamespace(model=None)
    api: Any = SimpleNamespace(client=server.client, preparation=nothing, config=Config(), started=0.0)
    routes = [*model_routes(api), *admin_routes(api)]
    return [route.path for route in routes if route.method == "POST" and route.path != "/flush_cache"]


async def post(server: Serving, path: str, kind: str | None, content: bytes = b"{}") -> httpx.Response:
    request = server.http.build_request("POST", path, content=content)
    del request.headers["content-type"]
    if kind is not None:
        request.headers["content-type"] = kind
    return await server.http.send(request)


async def test_without_a_key_bodies_have_the_content_type_of_json(server: Serving) -> None:
    paths = body_paths(server)
    assert {"/v1/chat/completions", "/generate", "/abort_request", "/v1/tokenize"} <= set(paths)
    for path in paths:
        for kind in JSON_TYPES:
            assert (await post(server, path, kind)).status_code == 400, (path, kind)
        for other in OTHER_TYPES:
            answer = await post(server, path, other)
            found = answer.status_code, answer.json()["error"]["code"]
            assert found == (415, "unsupported_media_type"), (path, other)
        assert (await post(server, path, None, b"")).status_code == 400, "without a body there is nothing to refuse"
    for path, expected in (("/nothing", 404), ("/v1/models", 405), ("/v1/audio/transcriptions", 404)):
        assert (await post(server, path, "multipart/form-data; boundary=x")).status_code == expected
    fields = b"Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    reader, writer = await server.connect(b"POST /v1/completions HTTP/1.1\r\n" + fields)
    assert (await reader.readline()).split()[1] == b"415"
    writer.close()
    assert server.engine.seen == []


@pytest.mark.serving(api_key=("k",))
async def test_with_a_key_content_type_and_origin_are_not_asked_for(server: Serving) -> None:
    server.http.headers["Authorization"] = "Bearer k"
    assert (await post(server, "/v1/completions", "text/plain", b'{"prompt": "a", "max_tokens": 1}')).status_code == 200
    answer = await server.http.post("/flush_cache", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200


FOREIGN: tuple[dict[str, str], ...] = (
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "http://localhost:1"},
    {"Origin": "https://localhost"}, {"Origin": "http://localhost.evil.example"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
)  # fmt: skip
OWN: tuple[dict[str, str], ...] = (
    {}, {"Origin": "http://localhost"}, {"Origin": "HTTP://LOCALHOST"}, {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
)  # fmt: skip


@pytest.mark.serving(cors_origins=("*",))
async def test_only_own_pages_change_the_servers_state(server: Serving) -> None:
    for path, body in (("/flush_cache", b""), ("/abort_request", b'{"rid": "a"}')):
        for headers in FOREIGN:
            answer = await server.http.post(path, content=body, headers={"Host": "localhost", **headers})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin"), (path, headers)
        for headers in OWN:
            answer = await server.http.post(path, content=body, headers={"Host": "localhost", **headers})
            assert answer.status_code == 200, (path, headers)
    answer = await server.http.post("/v1/completions", json=TEXT, headers={"Origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "*", "this is what --cors-origins is for"


def closing(target: str, host: str = "localhost") -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


async def exchange(server: Serving, *pieces: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await server.connect(*pieces)
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_body_of_two_lengths_is_the_last_of_its_connection(server: Serving) -> None:
    data = b'{"prompt": "a", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    smuggled = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
    encoding, length = b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n"
    for fields in (encoding + length, length + encoding, encoding + length + b"Connection: keep-alive\r\n"):
        answer = await exchange(server, head + fields + b"\r\n" + chunks + smuggled)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answer.lower()
    both = await exchange(server, head + encoding + b"\r\n" + chunks + closing("/version"))
    assert both.count(b"HTTP/1.1 200") == 2


TARGETS = (
    ("http://localhost/version", "localhost", 200), ("http://127.0.0.1:1919/version?x=1", "evil.example", 200),
    ("HTTP://localhost/version", "localhost", 200), ("https://[::1]:1/version", "x", 200),
    ("http://localhost", "localhost", 200), ("http://localhost?x", "localhost", 200),
    ("http://evil.example/version", "localhost", 403), ("http://localhost@evil.example/version", "localhost", 403),
    ("http:///version", "localhost", 404), ("ftp://localhost/version", "localhost", 404),
    ("http://localhost/nothing", "localhost", 404),
)  # fmt: skip


async def test_absolute_targets_are_accepted_and_name_the_host(server: Serving) -> None:
    for target, host, status in TARGETS:
        answer = await exchange(server, closing(target, host))
        assert (int(answer.split()[1]), answer.count(b"HTTP/1.1 ")) == (status, 1), target


async def test_slashes_behind_a_path_change_nothing(server: Serving) -> None:
    for path in ("/health/", "/health///?a=b%20c", "/v1/models/"):
        assert (await server.http.get(path)).status_code == 200, path
    assert (await server.http.post("/v1/completions/", json=TEXT)).status_code == 200
    for path in ("//health/", "//evil.example/", "/nothing/", "/health/x/", "/%0d%0aLocation:x/"):
        answered = await exchange(server, closing(path))
        assert answered.split()[1] == b"404", path
