"""A session of OpenAI's Python client: `python openai_session.py BASE_URL MODEL`."""

import asyncio
import sys
from typing import Any

import openai

from helpers.session import QUESTION, Answer, GetWeather, report

MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def main(url: str, model: str) -> None:
    """Everything that a program may do with it."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    create: Any = client.chat.completions.create
    greedy: dict[str, Any] = {"model": model, "temperature": 0}

    assert [found.id for found in client.models.list()] == [model]
    report("models", client.models.retrieve(model).id)

    whole = create(messages=MESSAGES, max_completion_tokens=8, **greedy)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage.completion_tokens <= 8
    report("chat", text)

    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(create(messages=MESSAGES, max_tokens=8, **streaming, **greedy))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    report("stream", len(chunks))

    assert asyncio.run(at_once(url, {**greedy, "messages": MESSAGES, "max_tokens": 8})) == [text] * 4
    report("async", 4)

    several = create(messages=MESSAGES, max_tokens=8, n=2, model=model, seed=1, logprobs=True, top_logprobs=2)
    for choice in several.choices:
        assert "".join(token.token for token in choice.logprobs.content).startswith(choice.message.content)
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    report("choices and logprobs", [choice.message.content for choice in several.choices])

    tools = [openai.pydantic_function_tool(GetWeather)]
    called = client.chat.completions.parse(
        messages=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=64, **greedy
    )
    (call,) = called.choices[0].message.tool_calls or []
    arguments = call.function.parsed_arguments
    assert isinstance(arguments, GetWeather)
    report("required tool", arguments.model_dump())

    chosen: Any = {"type": "function", "function": {"name": "GetWeather"}}
    with client.chat.completions.stream(
        messages=MESSAGES, tools=tools, tool_choice=chosen, max_tokens=64, **greedy
    ) as events:
        deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        final = events.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    assert isinstance(streamed.function.parsed_arguments, GetWeather)
    assert "".join(delta.arguments_delta for delta in deltas) == streamed.function.arguments
    report("streamed tool", len(deltas))

    history = [*MESSAGES, called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "21 C"}]
    answered = create(messages=history, tools=tools, tool_choice="none", max_tokens=8, **greedy)
    assert answered.choices[0].finish_reason in ("stop", "length")
    report("tool answer", answered.choices[0].message.content)

    formed = client.chat.completions.parse(messages=MESSAGES, response_format=Answer, max_tokens=64, **greedy)
    assert isinstance(formed.choices[0].message.parsed, Answer)
    report("structured", formed.choices[0].message.parsed.model_dump())

    with client.chat.completions.stream(messages=MESSAGES, response_format=Answer, max_tokens=64, **greedy) as events:
        assert events.get_final_completion().choices[0].message.parsed == formed.choices[0].message.parsed
    report("streamed structured", True)

    scored = client.completions.create(prompt="One, two, three,", max_tokens=4, logprobs=1, echo=True, **greedy)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == scored.choices[0].text
    report("completion", scored.choices[0].text)

    refused: list[str | None] = []
    for name, value in (("temperature", -1), ("messages", []), ("model", "another"), ("max_tokens", 10**6)):
        try:
            create(**{**greedy, "messages": MESSAGES, name: value})
        except (openai.BadRequestError, openai.NotFoundError) as error:
            refused.append(error.param)
    assert len(refused) == 4
    report("errors", refused)


async def at_once(url: str, body: dict[str, Any]) -> list[str]:
    """The same chat four times at once."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**body) for _ in range(4)))
    return [answer.choices[0].message.content for answer in answers]


main(*sys.argv[1:3])
