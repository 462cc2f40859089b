"""One streamed completion: whatever pieces it comes in, and whatever goes wrong with it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from helpers.raw_server import DONE, HANG, chunked, event, head, json_answer, raw_server, text_event, usage_event
from minisgl.errors import ConfigError
from minisgl_bench.client import parse_target, stream_completion
from minisgl_bench.metrics import RequestRecord

SSE = head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
BODY = text_event("one") + text_event(' "error" two') + text_event("", "length") + usage_event(7, 9, 3) + DONE


def ask(pieces: Sequence[bytes], keep: bool = False, timeout: float = 20.0) -> RequestRecord:

    async def main() -> RequestRecord:
        record = RequestRecord(0)
        async with asyncio.timeout(30), raw_server(lambda path, body: pieces) as url:
            target = parse_target(url, "secret")
            await stream_completion(target, "/v1/completions", b"{}", record, None, timeout, keep)
        return record

    return asyncio.run(main())


def check(record: RequestRecord) -> None:
    assert (record.failure, record.detail) == (None, "")
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 9, 3)
    assert len(record.times) == 3
    assert record.sent <= record.times[0] <= record.times[-1]


def test_counts_are_the_servers_and_times_those_of_events_with_tokens() -> None:
    check(ask([SSE, chunked(BODY)]))


def test_any_cut_through_chunks_and_events_is_put_together() -> None:
    whole = SSE + chunked(BODY[:100], end=False) + chunked(BODY[100:])
    for step in (1, 7, 61):
        check(ask([whole[at : at + step] for at in range(0, len(whole), step)]))


def test_line_ends_comments_and_event_names_are_no_matter() -> None:
    body = b": hello\n\n" + BODY.replace(b"data: {", b"event: message\nid: 4\ndata:{")
    check(ask([SSE, chunked(body.replace(b"\n", b"\r\n"))]))


def test_a_body_may_end_with_its_length_or_with_the_connection() -> None:
    check(ask([head("200 OK", f"content-length: {len(BODY)}"), BODY[:9], BODY[9:]]))
    check(ask([head("200 OK"), BODY]))


def test_the_role_of_a_chat_and_its_end_are_no_tokens() -> None:
    def delta(**fields: str) -> bytes:
        return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})

    body = delta(role="assistant", content="") + delta(content="a") + delta(content="b") + delta()
    record = ask([SSE, chunked(body + usage_event(5, 2, None) + DONE)], keep=True)
    assert record.failure is None
    assert (len(record.times), record.text, record.cached_tokens) == (2, "ab", None)


REFUSED = {"error": {"message": "slow down", "type": "rate_limit"}}


@pytest.mark.parametrize(
    ("pieces", "failure", "detail"),
    [
        ([json_answer(REFUSED, "429 Too Many Requests")], "HTTP 429", "slow down"),
        ([head("500 Oh") + b"<html>"], "HTTP 500", "<html>"),
        ([SSE, chunked(text_event("a") + event(REFUSED) + DONE)], "error in the stream", "slow down"),
        ([SSE, chunked(text_event("a"), end=False)], "cut off", "the connection was closed before the answer's end"),
        ([SSE, chunked(text_event("a"))], "cut off", "the stream ended without [DONE]"),
        ([], "cut off", "the connection was closed before the answer's end"),
        ([b"SSH-2.0-hello\r\n\r\n"], "cut off", "not an answer in HTTP/1.1: SSH-2.0-hello"),
        ([SSE, b"zz\r\n"], "cut off", "not an answer in HTTP/1.1: "),
        ([SSE, chunked(b"data: {\n\n")], "cut off", "not an answer in HTTP/1.1: an event is not JSON"),
        ([SSE, chunked(text_event("a") + DONE)], "no usage", "the server did not count the tokens"),
        ([SSE, chunked(usage_event(5, 0, 0) + DONE)], "no usage", "the server did not count"),
        ([SSE, chunked(text_event("a") + event({"choices": [], "usage": {"x": 1}}) + DONE)], "malformed answer", "Key"),
        ([SSE, chunked(text_event("a") + usage_event(5, 0, 0) + DONE)], "no tokens", "0 tokens in 1 events"),
        ([SSE, HANG], "timeout", "nothing more within 0.3 s"),
    ],
)
def test_what_goes_wrong_is_told_by_kind(pieces: list[bytes], failure: str, detail: str) -> None:
    record = ask(pieces, timeout=0.3 if HANG in pieces else 20.0)
    assert record.failure == failure
    assert record.detail.startswith(detail)


def test_nobody_listening_is_a_failure_to_connect() -> None:
    record = RequestRecord(0)
    target = parse_target("127.0.0.1:9", None)
    asyncio.run(stream_completion(target, "/", b"", record, None, 20.0, False))
    assert record.failure == "connect: ConnectionRefusedError"


def test_a_url_may_have_its_v1_and_a_path_and_the_key_is_sent() -> None:
    target = parse_target("http://127.0.0.1:8000/proxy/v1/", "sk-1")
    text = target.post("/v1/completions", b"{}").decode()
    assert text.startswith("POST /proxy/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n")
    assert "\r\nAuthorization: Bearer sk-1\r\n" in text
    assert text.endswith("\r\nContent-Length: 2\r\n\r\n{}")
    assert "Authorization" not in parse_target("http://[::1]:8000", None).post("/", b"").decode()


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("ftp://127.0.0.1", None, "not an address such as"),
        ("http://127.0.0.1:99999", None, "Port out of range"),
        ("http://", None, "not an address such as"),
        ("http://127.0.0.1", "a\r\nX: y", "--api-key must be made of printable ASCII"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str, key: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_target(url, key)


def call(pieces: Sequence[bytes], body: object = None) -> Any:

    async def main() -> Any:
        async with raw_server(lambda path, body: pieces or [json_answer({"path": path, "body": body})]) as url:
            return await asyncio.to_thread(parse_target(url, None).call, "/x", body, 0.5)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([json_answer(REFUSED, "418 Teapot")], "the server refuses GET /x with 418: slow down"),
        ([HANG], "no answer from .*/x: timed out"),
        ([b"SSH-2.0-hello\r\n\r\n"], "no answer from .*/x: SSH-2.0"),
        ([head("200 OK", "content-length: 1"), b"{"], "what /x says is not JSON"),
    ],
)
def test_whole_answers_are_fetched_and_refusals_told(pieces: list[bytes], message: str) -> None:
    assert call([], {"a": 1}) == {"path": "/x", "body": {"a": 1}}
    with pytest.raises(ConfigError, match=message):
        call(pieces)
