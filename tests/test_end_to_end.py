"""`python -m minisgl` as a user starts it: the real engine process, the bundled model, the openai client."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionMessageParam

from helpers.processes import BOUND, children, server, wait_for, wait_until_gone

NAME = "SmolLM2-135M-Instruct"


def connect(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def begin(client: openai.OpenAI) -> openai.Stream[Completion]:
    """A completion that takes long; its first token has come."""
    stream = client.completions.create(
        model=NAME, prompt="Tell me", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    return stream


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with server() as (_, url):
        yield connect(url)


def test_the_capital_of_france_is_paris(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert last.usage
    assert answer.usage
    assert last.usage.completion_tokens == answer.usage.completion_tokens


def test_a_seed_makes_an_answer_repeatable_among_others(client: openai.OpenAI) -> None:
    params: dict[str, Any] = {"model": NAME, "max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 7}
    several = client.completions.create(prompt=["The sea", "The sky", "A tree"], **params)
    assert client.completions.create(prompt="The sea", **params).choices[0].text == several.choices[0].text


def test_the_bundled_model_calls_tools_though_its_template_has_no_place_for_them(client: openai.OpenAI) -> None:
    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    parameters = {**city, "additionalProperties": False}
    function = {"name": "get_weather", "description": "The weather in a city", "parameters": parameters}
    question: Any = {"role": "user", "content": "What is the weather in Paris?"}

    def ask(*more: Any, **options: Any) -> Any:
        options = {"model": NAME, "temperature": 0, "max_tokens": 200, **options}
        tools: Any = [{"type": "function", "function": function}]
        return client.chat.completions.create(messages=[question, *more], tools=tools, **options).choices[0]

    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = ask(tool_choice=choice)
        assert (answer.message.content, answer.finish_reason) == (None, "tool_calls")
        call = answer.message.tool_calls[0]
        assert call.function.name == "get_weather"
        assert "Paris" in json.loads(call.function.arguments)["city"]
    told = ask(answer.message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"})
    assert "sunny" in told.message.content
    cut = ask(tool_choice="required", max_tokens=1)
    assert (cut.message.content, cut.message.tool_calls, cut.finish_reason) == ("", None, "length")


def test_an_answer_follows_a_schema_and_a_hostile_one_is_refused(client: openai.OpenAI) -> None:
    def answer(schema: dict[str, object]) -> str:
        chat = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Where is the Louvre? Answer as JSON."}],
            response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
            max_tokens=100,
        )
        assert chat.choices[0].finish_reason == "stop"
        return chat.choices[0].message.content or ""

    city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    assert list(json.loads(answer({**city, "additionalProperties": False}))) == ["city"]
    with pytest.raises(openai.BadRequestError, match="too much time or memory") as caught:
        answer({"type": "integer", "multipleOf": 1_000_003})
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        answer({"type": "array", "uniqueItems": True})


def test_a_client_that_leaves_frees_everything(client: openai.OpenAI) -> None:
    begin(client).close()
    wait_for(lambda: httpx.get(str(client.base_url.join("/health"))).json()["running"] == 0)


def test_a_killed_engine_ends_the_answers_and_the_server() -> None:
    with server() as (process, url):
        (engine,) = children(process.pid)
        stream = begin(connect(url))
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError):
            list(stream)
        assert process.wait(BOUND) != 0


def test_a_killed_server_takes_its_engine_along() -> None:
    with server() as (process, _):
        (engine,) = children(process.pid)
        process.kill()
        process.wait()
        wait_until_gone([engine])


def test_what_cannot_start_says_why_in_one_line() -> None:
    command = [sys.executable, "-m", "minisgl", "--model", "/nowhere/at/all", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr
