from typing import Any

import openai
import pytest

from helpers.serving import CHAT_TEMPLATE, MODEL, Serving

HELLO: list[Any] = [{"role": "user", "content": "hello 世界"}]


async def test_a_chat_answer_is_a_whole_object(server: Serving) -> None:
    answer = await server.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9)
    prompt = list(server.engine.seen[0].prompt.tolist())
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.created > 1_700_000_000
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == server.tokenizer.decode([prompt[i % len(prompt)] for i in range(9)])
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(prompt), "completion_tokens": 9, "total_tokens": len(prompt) + 9,
        "prompt_tokens_details": {"cached_tokens": len(prompt) // 2},
    }  # fmt: skip


async def test_a_chat_stream_opens_with_the_role_and_closes_with_reason_and_usage(server: Serving) -> None:
    whole = await server.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20)
    stream = await server.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage == whole.usage


async def test_a_stream_without_include_usage_has_none(server: Serving) -> None:
    for options in (None, {"continuous_usage_stats": True}):
        body = {"messages": HELLO, "max_tokens": 3, "stream": True, "stream_options": options}
        response = await server.http.post("/v1/chat/completions", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "usage" not in response.text
        assert response.text.endswith("data: [DONE]\n\n")


async def test_each_prompt_of_a_completion_becomes_its_choice(server: Serving) -> None:
    create = server.openai.completions.create
    ids = [server.tokenizer.encode(text) for text in ("one fox", "two dogs and more", "x")]
    for prompt in (["one fox", "two dogs and more", "x"], ids):
        answer = await create(model=MODEL, prompt=prompt, max_tokens=4)
        assert answer.id.startswith("cmpl-")
        assert answer.object == "text_completion"
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        expected = [server.tokenizer.decode([p[i % len(p)] for i in range(4)]) for p in ids]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        texts = ["", "", ""]
        async for chunk in await create(model=MODEL, prompt=prompt, max_tokens=4, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == expected
    single = await create(model=MODEL, prompt=ids[1], max_tokens=4)
    assert [choice.text for choice in single.choices] == expected[1:2]


async def test_completions_default_to_sixteen_tokens_and_chats_to_the_models_limit(server: Serving) -> None:
    text = (await server.http.post("/v1/completions", json={"prompt": "hello"})).json()
    chat = (await server.http.post("/v1/chat/completions", json={"messages": HELLO})).json()
    assert (text["usage"]["completion_tokens"], chat["usage"]["total_tokens"]) == (16, 128)


@pytest.mark.serving(delay=0.002)
async def test_stop_strings_are_cut_counted_and_end_the_request(server: Serving) -> None:
    ids = server.tokenizer.encode("a b STOP c d")
    body: Any = {"model": MODEL, "prompt": "a b STOP c d", "max_tokens": 60, "stop": ["STOP"]}
    answer = await server.openai.completions.create(**body)
    assert answer.usage is not None
    taken = answer.usage.completion_tokens
    assert "STOP" in server.tokenizer.decode(ids[:taken])
    assert "STOP" not in server.tokenizer.decode(ids[: taken - 1])
    chunks = [chunk async for chunk in await server.openai.completions.create(**body, stream=True)]
    for answers in ([answer], chunks):
        assert "".join(part.choices[0].text for part in answers) == "a b "
        assert answers[-1].choices[0].finish_reason == "stop"
    await server.until(lambda: not server.engine.live)
    assert server.client.num_live == 0


async def test_eos_is_not_shown_and_ignore_eos_goes_past_it(server: Serving) -> None:
    ids = [*server.tokenizer.encode("ab"), 1, *server.tokenizer.encode("cd")]
    body: dict[str, Any] = {"prompt": ids, "max_tokens": len(ids)}
    ended = (await server.http.post("/v1/completions", json=body)).json()
    on = (await server.http.post("/v1/completions", json={**body, "ignore_eos": True})).json()
    shown = {**body, "ignore_eos": True, "skip_special_tokens": False}
    special = (await server.http.post("/v1/completions", json=shown)).json()
    assert [r["choices"][0]["text"] for r in (ended, on, special)] == ["ab", "abcd", "ab</s>cd"]
    assert [r["choices"][0]["finish_reason"] for r in (ended, on, special)] == ["stop", "length", "length"]
    assert ended["usage"]["completion_tokens"] == len(server.tokenizer.encode("ab")) + 1


@pytest.mark.serving(client_priorities=("0:4",))
async def test_every_sampling_field_reaches_the_engine(server: Serving) -> None:
    body = {
        "model": MODEL, "prompt": "hi there", "max_tokens": 5, "temperature": 0, "top_p": 0.5, "top_k": 7,
        "min_p": 0.1, "seed": -3, "stop": "zz", "stop_token_ids": [4, 5], "ignore_eos": True, "min_tokens": 2,
        "skip_special_tokens": False, "presence_penalty": -1, "frequency_penalty": 1.5, "repetition_penalty": 1.1,
        "logit_bias": {"7": -100, "12": 3}, "logprobs": 2, "priority": 4, "user": "u", "metadata": {"a": "b"},
        "prompt_logprobs": 3, "allowed_token_ids": [7, 9], "bad_words": ["no"], "include_stop_str_in_output": True,
        "truncate_prompt_tokens": -1,
        "store": True, "n": 1, "best_of": 1,
        "echo": True, "suffix": None, "service_tier": "auto",
    }  # fmt: skip
    assert (await server.http.post("/v1/completions", json=body)).status_code == 200
    params = server.engine.seen[0].params
    assert server.engine.seen[0].priority == 4
    assert {name: getattr(params, name) for name in params.__struct_fields__} == {
        "temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": -3, "max_tokens": 5, "min_tokens": 2,
        "stop": ("zz",), "stop_token_ids": (4, 5), "ignore_eos": True, "skip_special_tokens": False,
        "presence_penalty": -1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.1,
        "logit_bias": {7: -100.0, 12: 3.0}, "logprobs": 2, "prompt_logprobs": 3, "grammar": None,
        "allowed_token_ids": (7, 9), "bad_words": ("no",), "include_stop_str_in_output": True,
        "truncate_prompt_tokens": -1,
        "bad_word_ids": tuple(sorted(tuple(server.tokenizer.encode(word)) for word in ("no", " no"))),
    }  # fmt: skip


@pytest.mark.serving(client_priorities=("0:4",))
async def test_whole_numbers_may_be_written_with_a_point(server: Serving) -> None:
    body = {
        "prompt": "x", "max_tokens": 3.0, "top_k": 7.0, "seed": -3.0, "min_tokens": 2.0, "priority": 4.0,
        "logprobs": 2.0, "n": 2.0, "best_of": 2.0,
    }  # fmt: skip
    answer = await server.http.post("/v1/completions", json=body)
    assert len(answer.json()["choices"]) == 2
    chat = {"messages": HELLO, "max_completion_tokens": 3.0, "logprobs": True, "top_logprobs": 2.0}
    assert (await server.http.post("/v1/chat/completions", json=chat)).status_code == 200
    native = {"text": "x", "sampling_params": {"max_new_tokens": 3.0, "sampling_seed": 1.0}, "priority": 1.0}
    assert (await server.http.post("/generate", json=native)).status_code == 200
    first, params = server.engine.seen[0], server.engine.seen[0].params
    found = (params.max_tokens, params.top_k, params.seed, params.min_tokens, params.logprobs, first.priority)
    assert found == (3, 7, -3, 2, 2, 4)
    assert all(isinstance(number, int) for number in found)
    schema = (await server.http.get("/openapi.json")).json()["components"]["schemas"]["CompletionRequest"]
    assert schema["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}


async def test_openais_defaults_and_a_seed_of_its_own_for_each_request(server: Serving) -> None:
    for _ in range(2):
        await server.openai.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3)
    first, second = (request.params for request in server.engine.seen)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (1.0, 1.0, 0, 3)
    assert first.seed is not None
    assert first.seed != second.seed


async def test_message_forms_and_template_variables_reach_the_template(server: Serving) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
    ]
    template = "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
    template += "<|im_start|>assistant\n<|im_end|>\n"
    for add, tail in ((None, "think"), (False, "")):
        variables = {"chat_template_kwargs": {"prefix": "think"}, "add_generation_prompt": add}
        body = {"messages": messages, "max_tokens": 1, **variables}
        assert (await server.http.post("/v1/chat/completions", json=body)).status_code == 200
        prompt = list(server.engine.seen[-1].prompt.tolist())
        assert server.tokenizer.decode(prompt, skip_special_tokens=False) == template + tail


@pytest.mark.serving(template="<s>" + CHAT_TEMPLATE, add_bos=True)
async def test_a_prompt_has_one_bos_whether_the_template_or_the_tokenizer_writes_it(server: Serving) -> None:
    chat = {"messages": HELLO, "max_tokens": 1}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "hello", "max_tokens": 1})):
        assert (await server.http.post(path, json=body)).status_code == 200
        prompt = list(server.engine.seen[-1].prompt.tolist())
        assert (prompt[0], prompt.count(0)) == (0, 1)


async def test_models_are_listed_and_found(server: Serving) -> None:
    models = [model async for model in server.openai.models.list()]
    assert [(model.id, model.object) for model in models] == [(MODEL, "model")]
    assert (await server.openai.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await server.openai.models.retrieve("some/other")
