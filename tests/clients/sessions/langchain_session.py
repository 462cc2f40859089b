"""A session of LangChain's client for OpenAI: `python langchain_session.py BASE_URL MODEL`."""

import functools
import operator
import sys
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

from helpers.session import QUESTION, Answer, GetWeather, report


def main(url: str, model: str) -> None:
    """Everything that an application may do with a chat model."""

    place: Any = {"base_url": url, "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}

    def chat(limit: int = 8, **settings: Any) -> Any:
        return ChatOpenAI(**place, max_tokens=limit, **settings)

    message = chat().invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)])
    assert message.content
    assert message.usage_metadata["output_tokens"] <= 8
    assert message.response_metadata["finish_reason"] in ("stop", "length")
    report("chat", message.content)

    one = chat().invoke(QUESTION).content
    chunks = list(chat(stream_usage=True).stream(QUESTION))
    whole = functools.reduce(operator.add, chunks)
    assert whole.content == one
    assert whole.usage_metadata["output_tokens"] <= 8
    report("stream", [len(chunks), whole.content])

    answers = chat().batch([QUESTION, "Count to three.", "Name a colour."])
    assert answers[0].content == one
    assert len(answers) == 3
    report("batch", [answer.content for answer in answers])

    scored = chat(logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = scored.response_metadata["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).startswith(scored.content)
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    report("logprobs", len(tokens))

    bound = chat(64).bind_tools([GetWeather], tool_choice="any", strict=True, parallel_tool_calls=False)
    called = bound.invoke("How is the weather in Rome?")
    (call,) = called.tool_calls
    assert call["name"] == "GetWeather"
    report("required tool", GetWeather.model_validate(call["args"]).model_dump())

    (streamed,) = functools.reduce(operator.add, bound.stream("How is the weather in Rome?")).tool_calls
    assert streamed["args"] == call["args"]
    report("streamed tool", streamed["args"])

    history = [HumanMessage("How is the weather?"), called, ToolMessage("21 C", tool_call_id=call["id"])]
    answer = chat().bind_tools([GetWeather], tool_choice="none").invoke(history)
    assert isinstance(answer, AIMessage)
    assert not answer.tool_calls
    report("tool answer", answer.content)

    for method in ("json_schema", "function_calling"):
        structured = chat(64).with_structured_output(Answer, method=method).invoke(QUESTION)
        assert isinstance(structured, Answer)
        report(f"structured by {method}", structured.model_dump())

    text = OpenAI(**place, max_tokens=4)
    report("completion", text.invoke("One, two, three,"))
    assert "".join(text.stream("One, two, three,")) == text.invoke("One, two, three,")
    report("completion stream", True)


main(*sys.argv[1:3])
