from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.serving import MODEL, Serving, serve_and
from minisgl.server.errors import BODY_LIMIT
from minisgl.server.protocol import NEUTRAL

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 2}


def chat(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def text(prompt: Any, **changes: Any) -> str:
    return json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 2, **changes})


# name: path, body, status, code, param
Row = tuple[str, str | bytes, int, str, str | None]
TABLE: dict[str, Row] = {
    "empty messages": (CHAT, chat(messages=[]), 400, "invalid_value", "messages"),
    "no messages": (CHAT, "{}", 400, "missing_required_parameter", "messages"),
    "messages a string": (CHAT, chat(messages="hi"), 400, "invalid_value", "messages"),
    "message a string": (CHAT, chat(messages=["hi"]), 400, "invalid_value", "messages.0"),
    "user without content": (CHAT, chat(messages=[{"role": "user"}]), 400, "invalid_value", "messages.0.content"),
    "content a number": (
        CHAT, chat(messages=[{"role": "user", "content": 3}]), 400, "invalid_value", "messages.0.content",
    ),
    "unknown role": (
        CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), 400, "invalid_value", "messages.0.role",
    ),
    "tool role": (
        CHAT, chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]),
        400, "unsupported_parameter", "messages.0.role",
    ),
    "tool calls": (
        CHAT, chat(messages=[*USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        400, "unsupported_parameter", "messages.1.tool_calls",
    ),
    "image": (
        CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        400, "unsupported_parameter", "messages.0.content",
    ),
    "prompt too long": (TEXT, text("a b " * 400), 400, "context_length_exceeded", "prompt"),
    "chat too long": (
        CHAT, chat(messages=[{"role": "user", "content": "a b " * 400}]), 400, "context_length_exceeded", "messages",
    ),
    "prompt and max_tokens too long": (TEXT, text("hi", max_tokens=128), 400, "context_length_exceeded", "max_tokens"),
    "max_tokens 0": (CHAT, chat(max_tokens=0), 400, "invalid_value", "max_tokens"),
    "max_tokens negative": (CHAT, chat(max_tokens=-1), 400, "invalid_value", "max_tokens"),
    "max_tokens a string": (CHAT, chat(max_tokens="5"), 400, "invalid_value", "max_tokens"),
    "max_tokens a fraction": (CHAT, chat(max_tokens=1.5), 400, "invalid_value", "max_tokens"),
    "max_tokens true": (CHAT, chat(max_tokens=True), 400, "invalid_value", "max_tokens"),
    "max_tokens huge": (CHAT, chat(max_tokens=10**30), 400, "context_length_exceeded", "max_tokens"),
    "two limits": (CHAT, chat(max_completion_tokens=3), 400, "invalid_value", "max_tokens"),
    "temperature NaN": (CHAT, chat(temperature=float("nan")), 400, "invalid_value", "temperature"),
    "temperature infinite": (CHAT, chat(temperature=float("inf")), 400, "invalid_value", "temperature"),
    "temperature overflows": (CHAT, '{"messages": [], "temperature": 1e999}', 400, "invalid_value", "temperature"),
    "temperature negative": (CHAT, chat(temperature=-0.1), 400, "invalid_value", "temperature"),
    "temperature a string": (CHAT, chat(temperature="hot"), 400, "invalid_value", "temperature"),
    "top_p 0": (CHAT, chat(top_p=0), 400, "invalid_value", "top_p"),
    "top_k -2": (CHAT, chat(top_k=-2), 400, "invalid_value", "top_k"),
    "min_p 2": (CHAT, chat(min_p=2), 400, "invalid_value", "min_p"),
    "seed too wide": (CHAT, chat(seed=2**64), 400, "invalid_value", "seed"),
    "stop empty string": (CHAT, chat(stop=""), 400, "invalid_value", "stop"),
    "stop of numbers": (CHAT, chat(stop=[1]), 400, "invalid_value", "stop"),
    "too many stops": (CHAT, chat(stop=["x"] * 17), 400, "invalid_value", "stop"),
    "stop id out of range": (CHAT, chat(stop_token_ids=[10**6]), 400, "invalid_value", "stop_token_ids"),
    "min_tokens over max_tokens": (CHAT, chat(min_tokens=3), 400, "invalid_value", "min_tokens"),
    "stream a string": (CHAT, chat(stream="yes"), 400, "invalid_value", "stream"),
    "stream_options alone": (
        CHAT, chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options",
    ),
    "unknown model": (CHAT, chat(model="gpt-9"), 404, "model_not_found", "model"),
    "unknown model of a completion": (TEXT, text("x", model="gpt-9"), 404, "model_not_found", "model"),
    "unknown field": (CHAT, chat(colour="red"), 400, "unknown_parameter", "colour"),
    "unknown field of a message": (
        CHAT, chat(messages=[{"role": "user", "content": "x", "mood": 1}]), 400, "unknown_parameter", "messages.0.mood",
    ),
    "n": (CHAT, chat(n=2), 400, "unsupported_parameter", "n"),
    "n true": (CHAT, chat(n=True), 400, "unsupported_parameter", "n"),
    "json mode": (
        CHAT, chat(response_format={"type": "json_object"}), 400, "unsupported_parameter", "response_format",
    ),
    "template variable taken": (
        CHAT, chat(chat_template_kwargs={"messages": []}), 400, "invalid_value", "chat_template_kwargs",
    ),
    "template variable a field": (
        CHAT, chat(chat_template_kwargs={"add_generation_prompt": True}), 400, "invalid_value", "chat_template_kwargs",
    ),
    "no prompt": (TEXT, "{}", 400, "missing_required_parameter", "prompt"),
    "empty prompt": (TEXT, text(""), 400, "invalid_value", "prompt"),
    "empty list of prompts": (TEXT, text([]), 400, "invalid_value", "prompt"),
    "an empty prompt among others": (TEXT, text(["x", ""]), 400, "invalid_value", "prompt"),
    "prompt null": (TEXT, text(None), 400, "invalid_value", "prompt"),
    "mixed prompts": (TEXT, text(["x", 1]), 400, "invalid_value", "prompt"),
    "booleans as ids": (TEXT, text([True]), 400, "invalid_value", "prompt"),
    "id too high": (TEXT, text([10**6]), 400, "invalid_value", "prompt"),
    "id beyond 64 bits": (TEXT, text([10**40]), 400, "invalid_value", "prompt"),
    "id negative": (TEXT, text([[5], [-1]]), 400, "invalid_value", "prompt"),
    "too many prompts": (TEXT, text(["x"] * 9), 400, "invalid_value", "prompt"),
    "messages in a completion": (TEXT, text("x", messages=USER), 400, "unknown_parameter", "messages"),
    "lone surrogate": (TEXT, '{"prompt": "a\\ud800b"}', 400, "invalid_json", None),
    "lone surrogate in a chat": (
        CHAT, '{"messages": [{"role": "user", "content": "\\udc00"}]}', 400, "invalid_json", None,
    ),
    "invalid JSON": (CHAT, '{"messages": [', 400, "invalid_json", None),
    "no body": (CHAT, "", 400, "invalid_json", None),
    "JSON list": (CHAT, "[1]", 400, "invalid_json", None),
    "not UTF-8": (CHAT, b'{"model": "\xff"}', 400, "invalid_json", None),
    "nested too deep": (CHAT, '{"messages": ' + "[" * 100_000, 400, "invalid_json", None),
    "body too large": (CHAT, b" " * (BODY_LIMIT + 1), 413, "request_too_large", None),
    "no such path": ("/v1/nothing", "{}", 404, "not_found", None),
    "wrong method": ("/v1/models", "{}", 405, "method_not_allowed", None),
}  # fmt: skip


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    """OpenAI's error object, whole and with nothing of ours in it."""
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    for leak in ("Traceback", "minisgl", "pydantic", ".py"):
        assert leak not in error["message"]


def test_every_bad_request_gets_its_error_and_leaves_the_server_well(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        for name, (path, body, status, code, param) in TABLE.items():
            seen = len(server.engine.seen)
            response = await server.http.post(path, content=body)
            try:
                check_error(response, status, code, param)
                assert len(server.engine.seen) == seen
                good = await server.http.post(CHAT, json=GOOD)
                assert good.status_code == 200
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        assert server.service.num_live == 0

    serve_and(tmp_path, check)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unsupported_fields_pass_when_neutral_and_are_refused_by_name_otherwise(tmp_path: Path, path: str) -> None:
    async def check(server: Serving) -> None:
        base: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "x"}
        base["max_tokens"] = 1
        for name, neutral in NEUTRAL.items():
            for value in (None, *neutral):
                response = await server.http.post(path, json={**base, name: value})
                assert response.status_code == 200, (name, value, response.text)
            response = await server.http.post(path, json={**base, name: ["something", "else"]})
            check_error(response, 400, "unsupported_parameter", name)
            assert response.json()["error"]["message"] == f"{name} is not supported yet"

    serve_and(tmp_path, check)


def test_a_missing_model_means_the_one_served(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        response = await server.http.post(CHAT, json={"messages": USER, "max_tokens": 1})
        assert response.json()["model"] == MODEL

    serve_and(tmp_path, check)


def test_a_base_model_refuses_chats_and_completes(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        response = await server.http.post(CHAT, json=GOOD)
        check_error(response, 400, "invalid_value", "messages")
        assert "no chat template" in response.json()["error"]["message"]
        assert (await server.http.post(TEXT, json={"prompt": "x"})).status_code == 200

    serve_and(tmp_path, check, template=None)


def test_what_the_template_refuses_is_a_400(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        response = await server.http.post(CHAT, json=GOOD)
        check_error(response, 400, "invalid_value", "messages")
        assert "only poems" in response.json()["error"]["message"]

    serve_and(tmp_path, check, template="{{ raise_exception('only poems') }}")


def test_what_the_engine_refuses_is_a_400_also_for_streams(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        server.engine.refuse = "it does not fit in the KV cache"
        for stream in (False, True):
            response = await server.http.post(CHAT, json={**GOOD, "stream": stream})
            check_error(response, 400, "invalid_value", None)
            assert "KV cache" in response.json()["error"]["message"]

    serve_and(tmp_path, check)


def test_an_unexpected_fault_is_a_500_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(server: Serving) -> None:
        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("secret")

        with monkeypatch.context() as patch:
            patch.setattr(type(server.tokenizer), "encode_chat", broken)
            response = await server.http.post(CHAT, json=GOOD)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert (await server.http.post(CHAT, json=GOOD)).status_code == 200

    serve_and(tmp_path, check)
