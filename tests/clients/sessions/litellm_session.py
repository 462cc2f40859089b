"""A session of LiteLLM: `python litellm_session.py BASE_URL MODEL`."""

import asyncio
import json
import sys
from typing import Any

import litellm

from helpers.session import QUESTION, Answer, report

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
MESSAGES = [{"role": "user", "content": QUESTION}]
FORM = {"name": "answer", "strict": True, "schema": Answer.model_json_schema()}


def check_arguments(text: str) -> dict[str, str]:
    """The arguments of a call of `get_weather`; as vLLM's, LiteLLM leaves `additionalProperties` out of its schema."""
    arguments: dict[str, str] = json.loads(text)
    assert set(arguments) >= {"city", "unit"}, text
    assert arguments["city"] in ("Paris", "Rome")
    assert arguments["unit"] in ("C", "F")
    return arguments


def main(url: str, model: str) -> None:
    """Both of its ways to our server: as OpenAI's, and as vLLM's."""
    for provider in ("openai", "hosted_vllm"):
        place: dict[str, Any] = {"model": f"{provider}/{model}", "api_base": url, "api_key": "none", "temperature": 0}

        whole = litellm.completion(messages=MESSAGES, max_tokens=8, **place)
        assert whole.usage.completion_tokens <= 8
        report(f"{provider}: chat", whole.choices[0].message.content)

        options = {"include_usage": True}
        chunks = list(litellm.completion(messages=MESSAGES, max_tokens=8, stream=True, stream_options=options, **place))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        assert built.usage.completion_tokens == whole.usage.completion_tokens
        report(f"{provider}: stream", text)

        several = asyncio.run(all_at_once(place))
        assert several == [text] * 3
        report(f"{provider}: async", len(several))

        called = litellm.completion(messages=MESSAGES, max_tokens=200, tools=TOOLS, tool_choice="required", **place)
        call = called.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather"
        report(f"{provider}: required tool", check_arguments(call.function.arguments))

        chosen = {"type": "function", "function": {"name": "get_weather"}}
        chunks = list(
            litellm.completion(messages=MESSAGES, max_tokens=200, tools=TOOLS, tool_choice=chosen, stream=True, **place)
        )
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        (streamed,) = built.choices[0].message.tool_calls
        report(f"{provider}: streamed tool", check_arguments(streamed.function.arguments))

        form = {"type": "json_schema", "json_schema": FORM}
        formed = litellm.completion(messages=MESSAGES, max_tokens=64, response_format=form, **place)
        value = Answer.model_validate_json(formed.choices[0].message.content)
        report(f"{provider}: structured", value.model_dump())

        status = 0
        try:
            litellm.completion(messages=MESSAGES, max_tokens=8, **{**place, "temperature": -1})
        except litellm.BadRequestError as error:
            status = error.status_code
        assert status == 400
        report(f"{provider}: error", status)

    place = {"model": f"text-completion-openai/{model}", "api_base": url, "api_key": "none"}
    completion = litellm.text_completion(prompt="One, two, three,", max_tokens=4, temperature=0, **place)
    report("text completion", completion.choices[0].text)


async def all_at_once(place: dict[str, Any]) -> list[str]:
    """The same chat three times at once."""
    answers = await asyncio.gather(*(litellm.acompletion(messages=MESSAGES, max_tokens=8, **place) for _ in range(3)))
    return [answer.choices[0].message.content for answer in answers]


main(*sys.argv[1:3])
