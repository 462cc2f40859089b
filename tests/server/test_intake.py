"""What comes in is bounded before it is built: bodies by size, counts and characters, threads by turns, connections."""

import asyncio
import functools
import json
import resource
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from helpers.serving import Serving, raw_post
from minisgl.core.types import Grammar
from minisgl.errors import InvalidRequestError
from minisgl.server import api_process, preparation
from minisgl.server.preparation import (
    MAX_NESTED,
    MAX_VALUES,
    Check,
    Preparation,
    Turns,
    check_counts,
    unless_disconnected,
)
from minisgl.text.tokenizer import Tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMALL: dict[str, Any] = {"prompt": "hello there", "max_tokens": 1}
LARGE: dict[str, Any] = {"prompt": "hi", "max_tokens": 1, "user": "x" * preparation.SMALL_BODY}


def filled(start: bytes, item: bytes, end: bytes, count: int) -> bytes:
    return start + item * count + end


FITTING = {
    "ids": filled(b'{"prompt":[', b"5,", b"5]}", MAX_VALUES - 1),
    "lists": filled(b'{"prompt":[', b"[5],", b"[5]]}", MAX_NESTED - 10),
    "messages": filled(b'{"messages":[', b'{"role":"user","content":"x"},', b"{}]}", MAX_NESTED // 3 - 10),
    "text of brackets": filled(b'{"prompt":"', b"[{:,", b'"}', MAX_VALUES),
    "text of quotes": filled(b'{"prompt":"', b'\\"', b'"}', 4 * MAX_VALUES),
    "text of backslashes": filled(b'{"prompt":"', b"\\\\", b'"}', MAX_VALUES),
    "text of code": filled(b'{"prompt":"', b'f(\\"a\\", [1, 2], {\\"k\\": \\"\\\\\\\\\\"});\\n', b'"}', MAX_NESTED),
}
TOO_MANY = {
    "ids": (filled(b'{"prompt":[', b"5,", b"5]}", MAX_VALUES + 1), "prompt"),
    "lists": (filled(b'{"prompt":[', b"[5],", b"[5]]}", MAX_NESTED), "prompt"),
    "texts": (filled(b'{"prompt":[', b'"x",', b'"x"]}', MAX_VALUES + 1), "prompt"),
    "ends in a backslash": (filled(b'{"prompt":[', b'"\\\\",', b'"x"]}', MAX_VALUES + 1), "prompt"),
    "messages": (filled(b'{"messages":[', b'{"role":"user","content":"x"},', b"{}]}", MAX_NESTED // 3), "messages"),
    "keys": (filled(b'{"model":"x","metadata":{', b'"a":1,', b'"a":1}}', MAX_NESTED), "metadata"),
    "stop strings": (filled(b'{"prompt":"x","stop":[', b'"x",', b'"x"]}', MAX_VALUES + 1), "stop"),
    "parts": (filled(b'{"messages":[{"content":[', b"{},", b"{}]}]}", MAX_NESTED), "messages"),
    "hidden by a second one": (filled(b'{"prompt":[', b"5,", b'5],"prompt":"x"}', MAX_VALUES + 1), "prompt"),
}


@pytest.mark.parametrize("body", FITTING.values(), ids=FITTING)
def test_a_body_of_as_many_values_as_a_request_may_have_is_read(body: bytes) -> None:
    json.loads(body)
    check_counts(body, MAX_VALUES)


@pytest.mark.parametrize(("body", "param"), TOO_MANY.values(), ids=TOO_MANY)
def test_a_body_of_too_many_values_is_refused_before_they_are_built(body: bytes, param: str) -> None:
    json.loads(body)
    with pytest.raises(InvalidRequestError, match=f"^{param} holds too many values: a body may have 524288") as error:
        check_counts(body, MAX_VALUES)
    assert (error.value.code, error.value.param) == ("invalid_value", param)


HOSTILE: dict[str, tuple[str, bytes, int, str, str | None]] = {
    "too large": (TEXT, b" " * (2**22 + 10_000), 413, "request_too_large", None),
    "a long text": (TEXT, b'{"prompt": "%s"}' % (b"hello " * 500_000), 400, "context_length_exceeded", "prompt"),
    "long texts": (TEXT, b'{"prompt": ["x","%s"]}' % (b"hello " * 500_000), 400, "context_length_exceeded", "prompt"),
    "one word": (TEXT, b'{"prompt": "%s"}' % (b"x" * 4_000_000), 400, "context_length_exceeded", "prompt"),
    "blanks": (TEXT, b'{"prompt": "%sx"}' % (b" " * 4_000_000), 400, "context_length_exceeded", "prompt"),
    "escapes": (TEXT, b'{"prompt": "%s"}' % (b"\\u4e2d" * 600_000), 400, "context_length_exceeded", "prompt"),
    "a long message": (CHAT, b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"word " * 800_000),
        400, "context_length_exceeded", "messages"),
    "to generate": ("/generate", b'{"text": "%s"}' % (b"word " * 800_000), 400, "context_length_exceeded", "text"),
    "to tokenize": ("/tokenize", b'{"prompt": "%s"}' % (b"word " * 800_000), 400, "context_length_exceeded", "prompt"),
    "prompts": (TEXT, b'{"prompt": [%s"x"]}' % (b'"x",' * 100_000), 400, "invalid_value", "prompt"),
    "ids": (TEXT, b'{"prompt": [%s5]}' % (b"5," * 100_000), 400, "context_length_exceeded", "prompt"),
    "too many ids": (TEXT, TOO_MANY["ids"][0], 400, "invalid_value", "prompt"),
    "too many messages": (CHAT, TOO_MANY["messages"][0], 400, "invalid_value", "messages"),
    "too many ids to decode": ("/detokenize", b'{"tokens": [%s5]}' % (b"5," * 600_000), 400, "invalid_value", "tokens"),
    "cut and too many": (TEXT, b'{"prompt": [%s' % (b"5," * 600_000), 400, "invalid_json", None),
    "deep": (CHAT, b'{"messages": %s' % (b"[" * 1_000_000), 400, "invalid_json", None),
    "too many, and no UTF-8": (TEXT, b'{"\xff": [%s5]}' % (b"5," * 600_000), 400, "invalid_json", None),
}  # fmt: skip


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each text that is tokenised from here on."""
    lengths: list[int] = []
    encode = Tokenizer.encode

    def noting(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", noting)
    return lengths


async def test_hostile_bodies_are_refused_by_what_is_wrong_and_build_nothing(
    server: Serving, encoded: list[int]
) -> None:
    for name, (path, body, status, code, param) in HOSTILE.items():
        answer = await server.http.post(path, content=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param), (name, error)
    assert max(encoded, default=0) <= 10
    assert (await server.http.post(TEXT, json=SMALL)).status_code == 200


@pytest.mark.serving(max_seq_len=1000)
async def test_a_text_that_is_far_too_long_is_refused_after_its_first_pieces(
    server: Serving, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "PIECE", 512)
    monkeypatch.setattr(preparation, "PIECE_SLACK", 8)
    word = "<|im_start|>"
    ids = server.tokenizer.encode(word * 900)
    encoded.clear()
    fits = await server.http.post(TEXT, json={"prompt": word * 900, "max_tokens": 1})
    assert len(ids) < 1000 < 8 * 1000 < 900 * len(word)
    assert fits.status_code == 200, fits.text
    assert fits.json()["usage"]["prompt_tokens"] == len(ids)
    assert max(encoded) == 900 * len(word)
    encoded.clear()
    refused = await server.http.post(TEXT, json={"prompt": "? " * 6000, "max_tokens": 1})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert set(encoded) == {512}
    assert len(encoded) < 10


@pytest.mark.serving(max_body_size=2048)
async def test_the_size_of_a_body_is_settable(server: Serving) -> None:
    assert (await server.http.post(TEXT, content=json.dumps(SMALL).ljust(2048))).status_code == 200
    refused = await server.http.post(TEXT, content=json.dumps(SMALL).ljust(2049))
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert "2048 bytes" in refused.json()["error"]["message"]


async def test_errors_name_the_limits(server: Serving) -> None:
    for stop, param, limit in (["x"] * 17, "stop", "16"), (["x" * 1025], "stop.0", "1024"):
        error = (await server.http.post(TEXT, json={**SMALL, "stop": stop})).json()["error"]
        assert (error["param"], f"at most {limit} " in error["message"]) == (param, True), error


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "HELD_BYTES", 0)


def half(body: int, sent: int, key: str = "a") -> bytes:
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Length: {body}\r\n\r\n"
    return head.encode() + b" " * sent


@pytest.mark.serving(max_body_size=200_000, api_key=("a", "b", "c"))
async def test_half_sent_bodies_of_a_client_leave_room_for_others(small_reserve: None, server: Serving) -> None:
    held = [await server.connect(half(200_000, 190_000)) for _ in range(2)]  # 4 x 200 kB may be held, half by a client
    await asyncio.sleep(0.2)

    async def post(key: str, body: dict[str, Any]) -> tuple[int, str | None]:
        answer = await server.http.post(TEXT, json=body, headers={"Authorization": f"Bearer {key}"})
        return answer.status_code, answer.json().get("error", {}).get("code")

    assert await post("a", LARGE) == (503, "overloaded")
    assert await post("a", SMALL) == (200, None)
    assert await post("b", LARGE) == (200, None)
    held += [await server.connect(half(200_000, 190_000, "b")) for _ in range(2)]
    await asyncio.sleep(0.2)
    assert await post("b", LARGE) == (503, "overloaded")
    assert await post("b", SMALL) == (200, None)
    assert await post("c", LARGE) == (200, None)  # beyond the bound, as it has less than a fair share
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.2)
    assert await post("a", LARGE) == (200, None)


async def test_a_body_that_comes_drop_by_drop_is_refused(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(preparation, "BODY_RATE", 1e9)
    reader, writer = await server.connect(half(100, 10), b" ", b" ", b" ", b" ")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in await reader.readuntil(b"}}")
    writer.close()


async def test_clients_have_their_turns_one_after_the_other() -> None:
    turns, order, started = Turns(1), list[str](), threading.Event()
    hold = threading.Event()

    def work(name: str) -> Callable[[], str]:
        def run() -> str:
            started.set()
            assert hold.wait(10)
            order.append(name)
            return name

        return run

    names = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"]
    tasks = [asyncio.create_task(turns.run(name[0], work(name))) for name in names]
    await asyncio.to_thread(started.wait, 10)
    tasks[0].cancel()  # its thread works on, and nobody else may have it
    tasks[2].cancel()  # it waits
    await asyncio.sleep(0.01)
    assert order == []
    hold.set()
    rest = await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a1", "a2", "b1", "c1", "a4", "b2"]
    assert [type(rest[0]), type(rest[2])] == [asyncio.CancelledError] * 2
    assert await turns.run("d", lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        await turns.run("d", lambda: 1 // 0)
    assert await turns.run("d", lambda: 6) == 6


async def test_small_requests_and_health_wait_for_no_large_one(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, prepared = threading.Event(), list[int]()
    completion = Preparation.completion

    def slow(self: Preparation, body: bytes) -> Any:
        prepared.append(len(body))
        if len(body) > preparation.SMALL_BODY:
            assert hold.wait(10)
        return completion(self, body)

    monkeypatch.setattr(Preparation, "completion", slow)
    large = [asyncio.create_task(server.http.post(TEXT, json=LARGE)) for _ in range(8)]
    leaving = asyncio.create_task(server.http.post(TEXT, json={**LARGE, "n": 2, "temperature": 1}))
    await server.until(lambda: len(prepared) == 1)
    await asyncio.sleep(0.1)
    for _ in range(20):
        assert (await server.http.post(TEXT, json=SMALL)).status_code == 200
        assert (await server.http.get("/health")).status_code == 200
    assert len([size for size in prepared if size > preparation.SMALL_BODY]) == 1
    leaving.cancel()
    await asyncio.sleep(0.1)
    hold.set()
    assert {answer.status_code for answer in await asyncio.gather(*large)} == {200}
    assert len([size for size in prepared if size > preparation.SMALL_BODY]) == 8


@pytest.mark.serving(delay=0.02)
async def test_a_body_needs_no_thread_where_it_is_brief_and_nobody_else_is_served(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, own = list[str](), threading.current_thread()
    monkeypatch.setattr(preparation, "BRIEF_REST", 0.0)
    for kind in (Preparation, Tokenizer):
        for name in ("completion", "chat", "generate", "tokenize") if kind is Preparation else ("render_chat",):
            prepare = getattr(kind, name)

            def noting(*args: Any, prepare: Any = prepare, **named: Any) -> Any:
                threads.append("loop" if threading.current_thread() is own else "thread")
                return prepare(*args, **named)

            monkeypatch.setattr(kind, name, noting)

    async def where(path: str, body: dict[str, Any]) -> str:
        threads.clear()
        answer = await server.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        (found,) = set(threads)
        return found

    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    one = {"sampling_params": {"max_new_tokens": 1}}
    brief = [(TEXT, SMALL), (TEXT, {**SMALL, "prompt": [5] * 100}), ("/generate", {"text": "hi", **one})]
    longer: list[dict[str, Any]] = [
        {"prompt": "hi", "user": "x" * 4096},
        {"metadata": {str(number): "x" for number in range(16)}},
        {"prompt": [[5]] * 6},
    ]
    assert [await where(*each) for each in brief] == ["loop"] * 3
    assert {await where(TEXT, {**SMALL, **each}) for each in longer} == {"thread"}
    assert {await where(CHAT, chat), await where("/tokenize", {"messages": chat["messages"]})} == {"thread"}
    other = asyncio.create_task(server.http.post(TEXT, json={"prompt": "hi", "max_tokens": 40}))
    await server.until(lambda: server.client.num_live == 1)
    assert [await where(*each) for each in brief] == ["thread"] * 3
    assert (await other).status_code == 200
    monkeypatch.setattr(preparation, "BRIEF_REST", 1e9)
    assert [await where(*each) for each in brief] == ["loop", "thread", "thread"], "the loop rests"


@pytest.mark.parametrize("leaves", [True, False])
async def test_work_ends_when_its_client_leaves_and_a_cancellation_stays_one(leaves: bool) -> None:
    gone, ended, before = asyncio.Event(), list[str](), asyncio.all_tasks()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            ended.append("work")

    assert await unless_disconnected(receive, asyncio.sleep(0.01, "done")) == "done"
    task = asyncio.create_task(unless_disconnected(receive, work()))
    await asyncio.sleep(0.01)
    if leaves:
        gone.set()
    else:
        task.cancel()
    with pytest.raises(ClientDisconnect if leaves else asyncio.CancelledError):
        await task
    assert ended == ["work"]
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before, "nobody waits for the client any more"


async def test_a_client_that_leaves_when_its_work_is_done_cancels_nothing_else() -> None:
    result: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def receive() -> Message:
        result.set_result("done")
        return {"type": "http.disconnect"}

    async def work() -> str:
        return await result

    assert await unless_disconnected(receive, work()) == "done"
    for _ in range(3):
        await asyncio.sleep(0)


HOLD = threading.Semaphore(0)
STARTED: list[str] = []  # sources, in the order in which their checks began


def slow_check(grammar: Grammar) -> Check | None:
    """A grammar whose source begins with "slow" takes a permit of HOLD; "wrong" is refused then; others are known."""

    def check() -> None:
        STARTED.append(grammar.source)
        assert HOLD.acquire(timeout=10)
        if grammar.source == "slow wrong":
            raise InvalidRequestError("no such grammar", param="grammar")

    return check if grammar.source.startswith("slow") else None


@pytest.mark.serving(check_grammar=slow_check, api_key=("a", "b"))
async def test_no_request_waits_for_the_grammars_of_another_client(server: Serving) -> None:
    STARTED.clear()

    def post(key: str, **asked: Any) -> asyncio.Task[httpx.Response]:
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.create_task(server.http.post(TEXT, json={**SMALL, **asked}, headers=headers))

    slow = [post("a", structured_outputs={"regex": f"slow {number}"}) for number in range(6)]
    await server.until(lambda: len(STARTED) == 4)
    await asyncio.sleep(0.1)  # of the last two one waits for a thread, the other for the client's turn
    wrong = post("b", structured_outputs={"regex": "slow wrong"})
    await asyncio.sleep(0.1)  # it waits for a thread now, so what follows waits for its client's turn
    leaving = post("b", guided_regex="slow leaving")
    for _ in range(5):
        assert (await post("a")).status_code == 200
        assert (await post("a", guided_regex="known")).status_code == 200
    assert not any(task.done() for task in (*slow, wrong))
    leaving.cancel()
    await asyncio.wait([leaving])
    while (count := len(STARTED)) < 7:
        HOLD.release()
        await server.until(functools.partial(lambda before: len(STARTED) > before, count))
    assert STARTED[5] == "slow wrong", "the other client's turn comes before the sixth of the first"
    HOLD.release(4)
    refused = (await wrong).json()["error"]
    assert refused["param"] == "structured_outputs"
    assert {answer.status_code for answer in await asyncio.gather(*slow)} == {200}


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> api_process.Crowd:
    """The connections of the test's server, which must be asked for before it."""
    crowd = api_process.Crowd()
    monkeypatch.setattr(api_process, "Crowd", lambda: crowd)
    return crowd


async def open_until(server: Serving, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    found = []
    for _ in range(count):
        found.append(await server.connect())
        await asyncio.sleep(0.01)
    return found


async def test_the_oldest_idle_connection_makes_room_for_a_new_one(
    crowd: api_process.Crowd, server: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    crowd.bound = 10
    used = await server.connect(GET)
    assert (await used[0].readuntil(b"}")).startswith(b"HTTP/1.1 200")
    idle = await open_until(server, 30)
    for _ in range(5):
        reader, writer = await server.connect(GET)
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.close()
    await asyncio.sleep(0.1)
    open_still = [not reader.at_eof() for reader, _ in [used, *idle]]
    assert open_still == sorted(open_still), "the oldest are closed"
    assert 8 <= sum(open_still) <= 10
    lines = [record.message for record in caplog.records if "more than" in record.message]
    assert len(lines) == 1
    for _, writer in [used, *idle]:
        writer.close()


@pytest.mark.serving(delay=0.05)
async def test_without_an_idle_connection_a_new_one_is_told_503(
    crowd: api_process.Crowd, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd.bound = 8
    monkeypatch.setattr(api_process, "REFUSED_AT_ONCE", 3)
    request = raw_post(TEXT, {"prompt": "hello there", "max_tokens": 100, "stream": True})
    busy = [await server.connect(request) for _ in range(8)]
    await server.until(lambda: server.client.num_live == 8)
    live = server.client.num_live
    reader, writer = await server.connect(GET)
    answer = await asyncio.wait_for(reader.read(), 5)  # to its end: it is closed
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5\r\n" in answer
    assert b'"code":"overloaded"' in answer
    writer.close()
    flood = await open_until(server, 12)
    await asyncio.sleep(0.1)
    assert sum(reader.at_eof() or bool(reader.exception()) for reader, _ in flood) >= 12 - 3
    assert server.client.num_live == live, "those that are answered stay"
    for _, writer in [*busy, *flood]:
        writer.close()
    await server.until(lambda: server.client.num_live == 0)
    await asyncio.sleep(0.1)
    assert (await server.http.get("/version")).status_code == 200


@pytest.mark.serving(delay=0.02)
async def test_a_connection_is_idle_between_its_requests_only(crowd: api_process.Crowd, server: Serving) -> None:
    _, writer = await server.connect(GET[:20])
    await server.until(lambda: len(crowd.idle) == 1)  # half a head is no request
    writer.write(GET[20:] + raw_post(TEXT, {"prompt": "hello there", "max_tokens": 10}))
    await server.until(lambda: server.client.num_live == 1)
    assert not crowd.idle
    await server.until(lambda: server.client.num_live == 0)
    await server.until(lambda: len(crowd.idle) == 1)
    writer.close()
    await server.until(lambda: not crowd.idle)


@pytest.mark.parametrize(
    ("limits", "bound", "raised"),
    [((1024, 1024), 896, None), ((1024, 20000), 16384, 20000), ((256, 256), 128, None), ((100, 100), 50, None)],
)
def test_the_bound_on_connections_follows_from_the_limit_which_is_raised(
    limits: tuple[int, int], bound: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    crowd = api_process.Crowd()
    assert crowd.bound == bound
    assert asked == [(limits[1], limits[1])]
