import json
import re
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from helpers.bad_requests import BAD, CHAT, GOOD, STATUS, TEXT, USER
from helpers.serving import MODEL, Serving
from minisgl.server.protocol import ChatRequest, CompletionRequest
from minisgl.text.tokenizer import TextStream


def check_error(response: httpx.Response, status: int, code: str, param: str | None) -> None:
    """OpenAI's error object, whole and with nothing of ours in it."""
    error = response.json()["error"]
    found = error["param"]
    if found != param and found is not None:
        found = re.sub(r"\.\d+$", "", found)  # an item of a list
    assert (response.status_code, error["code"], found) == (status, code, param), error
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    for leak in ("Traceback", "minisgl", "msgspec", ".py"):
        assert leak not in error["message"]


async def test_every_bad_request_gets_its_error_and_leaves_the_server_well(server: Serving) -> None:
    assert len(BAD) >= 300
    assert len({bad.name for bad in BAD}) == len(BAD)
    wrong: list[str] = []
    for name, path, body, code, param in BAD:
        seen = len(server.engine.seen)
        response = await server.http.post(path, content=body)
        try:
            check_error(response, STATUS.get(code, 400), code, param)
            assert len(server.engine.seen) == seen
            good = await server.http.post(TEXT, json={"prompt": [5], "max_tokens": 1})
            assert good.status_code == 200
        except AssertionError as error:
            wrong.append(f"{name}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
    assert server.client.num_live == 0
    assert not server.engine.live


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_unsupported_fields_pass_when_they_ask_for_nothing(server: Serving, path: str) -> None:
    base: dict[str, Any] = {"messages": USER} if path == CHAT else {"prompt": "x"}
    base["max_tokens"] = 1
    neutral: dict[str, tuple[Any, ...]] = {
        "service_tier": ("auto", "default"), "suffix": ("",), "functions": ([],), "function_call": ("none", "auto"),
        "modalities": (["text"],), "verbosity": ("medium",), "tools": ([],), "tool_choice": ("none", "auto"),
        "n": (1,),
        "top_logprobs": (0,), "use_beam_search": (False,), "length_penalty": (1, 1.0), "bad_words": ([],),
        "include_stop_str_in_output": (False,), "spaces_between_special_tokens": (True,), "documents": ([],),
        "add_special_tokens": (path == TEXT,), "include_reasoning": (True,), "return_token_ids": (False,),
        "response_format": ({"type": "text"},), "logit_bias": ({},), "parallel_tool_calls": (True, False),
    }  # fmt: skip
    model = ChatRequest if path == CHAT else CompletionRequest
    fields = {*model.__struct_fields__, *model.unsupported}
    for name in neutral.keys() & fields:
        for value in (None, *neutral[name]):
            response = await server.http.post(path, json={**base, name: value})
            assert response.status_code == 200, (name, value, response.text)
    for name in fields - base.keys():
        response = await server.http.post(path, json={**base, name: None})
        assert response.status_code == 200, (name, response.text)
        assert response.json()["model"] == MODEL  # it is the one served also where none is named


@pytest.mark.parametrize(
    ("template", "message"), [(None, "no chat template"), ("{{ raise_exception('only poems') }}", "only poems")]
)
async def test_what_the_template_refuses_is_a_400_and_may_be_completed(
    server: Serving, template: str | None, message: str
) -> None:
    response = await server.http.post(CHAT, json=GOOD)
    check_error(response, 400, "invalid_value", "messages")
    assert message in response.json()["error"]["message"]
    assert (await server.http.post(TEXT, json={"prompt": "x"})).status_code == 200


async def test_what_the_engine_refuses_is_a_400_also_for_streams(server: Serving) -> None:
    server.engine.refuse = "it does not fit in the KV cache"
    for stream in (False, True):
        response = await server.http.post(CHAT, json={**GOOD, "stream": stream})
        check_error(response, 400, "invalid_value", None)
        assert "KV cache" in response.json()["error"]["message"]


async def test_an_unexpected_fault_is_a_500_that_tells_nothing(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(type(server.tokenizer), "render_chat", broken)
        response = await server.http.post(CHAT, json=GOOD)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert (await server.http.post(CHAT, json=GOOD)).status_code == 200


@pytest.mark.serving(delay=0.002)
async def test_an_unexpected_fault_in_a_stream_is_an_event_of_its_own(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, pushed = TextStream.push, []

    def broken(stream: TextStream, tokens: Sequence[int]) -> str:
        pushed.append(tokens)
        if len(pushed) > 2:
            raise RuntimeError("secret")
        return push(stream, tokens)

    monkeypatch.setattr(TextStream, "push", broken)
    response = await server.http.post(TEXT, json={"prompt": "a b c d", "max_tokens": 9, "stream": True})
    *_, last, done, end = response.text.split("\n\n")
    assert (response.status_code, done, end) == (200, "data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in response.text
