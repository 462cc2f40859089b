from typing import Any

import pytest

from helpers.serving import MODEL, Serving
from helpers.stub_engine import scored
from minisgl.server.preparation import nth_seed

USER: list[Any] = [{"role": "user", "content": "hello"}]
TEXT = "/v1/completions"


async def test_n_answers_have_one_prompt_and_seeds_of_their_own(server: Serving) -> None:
    create = server.openai.chat.completions.create
    answer = await create(model=MODEL, messages=USER, max_tokens=3, n=3, seed=7)
    seen = server.engine.seen
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({request.params.seed for request in seen}) == 3
    assert seen[0].params.seed == 7
    assert list(seen[0].prompt) == list(seen[1].prompt) == list(seen[2].prompt)
    await create(model=MODEL, messages=USER, max_tokens=3, n=3, seed=7)
    assert [r.params.seed for r in seen[3:]] == [r.params.seed for r in seen[:3]]
    await create(model=MODEL, messages=USER, max_tokens=3, n=2)
    assert seen[6].params.seed != seen[7].params.seed
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    prompt = len(seen[0].prompt)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 9)
    assert usage.prompt_tokens_details.cached_tokens == prompt // 2


async def test_streamed_answers_open_and_end_each_on_its_own(server: Serving) -> None:
    stream = await server.openai.chat.completions.create(model=MODEL, messages=USER, max_tokens=5, n=3, stream=True)
    said: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    async for chunk in stream:
        said[chunk.choices[0].index].append(chunk.choices[0])
    for parts in said.values():
        assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]


async def test_several_prompts_with_n_are_numbered_prompt_by_prompt(server: Serving) -> None:
    answer = await server.openai.completions.create(model=MODEL, prompt=["one fox", "dogs"], max_tokens=2, n=2, seed=1)
    ids = [server.tokenizer.encode(text) for text in ("one fox", "one fox", "dogs", "dogs")]
    assert [list(r.prompt) for r in server.engine.seen] == ids
    assert [r.params.seed for r in server.engine.seen] == [1, nth_seed(1, 1)] * 2
    assert [c.text for c in answer.choices] == [server.tokenizer.decode([p[i % len(p)] for i in range(2)]) for p in ids]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[2])


async def test_best_of_returns_the_most_probable_by_the_token(server: Serving) -> None:
    # The stub's log-probabilities fall with each token: the shortest answer is the best.
    lengths = {"0": 5, "1": 2, "2": 7, "3": 3}
    letter = server.tokenizer.encode("abcdefgh")[:1]
    server.engine.say = lambda request: letter * lengths[request.id.rpartition("-")[2]]
    answer = await server.openai.completions.create(model=MODEL, prompt="x", max_tokens=9, n=2, best_of=4)
    assert [(c.index, len(c.text)) for c in answer.choices] == [(0, 2), (1, 3)]
    assert [c.logprobs for c in answer.choices] == [None, None]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(lengths.values()) + 4


@pytest.mark.serving(delay=0.02)
async def test_continuous_usage_is_in_every_chunk(server: Serving) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await server.openai.completions.create(
        model=MODEL, prompt="a b c", max_tokens=6, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert len(counts) >= 3


async def test_chat_logprobs_have_tokens_bytes_and_likeliest(server: Serving) -> None:
    text = "Hi 😀!"
    server.speak(text)
    tokens = server.tokenizer.encode(text)
    body: Any = {"model": MODEL, "messages": USER, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    answer = await server.openai.chat.completions.create(**body)
    assert answer.choices[0].message.content == text
    chunks = [chunk async for chunk in await server.openai.chat.completions.create(**body, stream=True)]
    for answers in ([answer], chunks):
        logprobs = [answer.choices[0].logprobs for answer in answers]
        found = [entry for part in logprobs if part is not None for entry in part.content or ()]
        assert [entry.logprob for entry in found] == [-1.0 - i for i in range(len(tokens) + 1)]
        assert b"".join(bytes(entry.bytes) for entry in found) == (text + "</s>").encode()
        parts = [entry.token for entry in found if entry.token.startswith("bytes:")]
        assert parts
        assert all(part.startswith("bytes:\\x") for part in parts)
        tops = [list(scored(0, i, 2).top_logprobs) for i in range(len(found))]
        assert [[top.logprob for top in entry.top_logprobs] for entry in found] == tops
        assert found[0].top_logprobs[1].token == found[0].token


@pytest.mark.parametrize("stop", [None, "dog", "nothing"])
@pytest.mark.serving(delay=0.001)
async def test_streamed_logprobs_are_those_of_the_whole_answer(server: Serving, stop: str | None) -> None:
    server.speak("The fox 世界 and the dogs, not hing")
    body = {"prompt": "x", "max_tokens": 40, "logprobs": 1, "stop": stop}
    whole = (await server.http.post(TEXT, json=body)).json()["choices"][0]
    text = ""
    lists: dict[str, list[Any]] = {name: [] for name in whole["logprobs"]}
    async for chunk in await server.openai.completions.create(model=MODEL, stream=True, **body):  # type: ignore[call-overload]
        text += chunk.choices[0].text
        for name, found in lists.items():
            found += getattr(chunk.choices[0].logprobs, name)
    assert text == whole["text"]
    assert lists == whole["logprobs"]
    assert "dogs" in text or stop == "dog"
    offsets = whole["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    for token, start in zip(whole["logprobs"]["tokens"], offsets, strict=True):
        if not token.startswith("bytes:") and token != "</s>" and start + len(token) <= len(text):
            assert text[start : start + len(token)] == token


async def test_echo_gives_the_prompt_with_its_logprobs_as_harnesses_need_it(server: Serving) -> None:
    prompt = "The fox 世界"
    ids = server.tokenizer.encode(prompt)
    for given in (prompt, ids, [prompt], [ids]):
        for limit in (0, 1):
            body = {"prompt": given, "max_tokens": limit, "logprobs": 1, "echo": True, "temperature": 0}
            answer = (await server.http.post(TEXT, json=body)).json()
            choice = answer["choices"][0]
            found = choice["logprobs"]
            assert choice["text"] == prompt + server.tokenizer.decode(ids[:limit])
            assert len(found["tokens"]) == len(ids) + limit
            assert found["token_logprobs"][: len(ids)] == [None, *(-1.0 - i for i in range(1, len(ids)))]
            assert found["top_logprobs"][0] is None
            assert max(found["top_logprobs"][1].values()) == -1.5
            assert found["text_offset"][0] == 0
            assert found["text_offset"][len(ids) :] == [len(prompt)] * limit
            assert answer["usage"]["completion_tokens"] == limit
            assert (server.engine.seen[-1].params.max_tokens, choice["finish_reason"]) == (1, "length")


@pytest.mark.serving(delay=0.002)
async def test_an_echo_is_streamed_before_the_answer(server: Serving) -> None:
    for logprobs in (None, 0):
        body = {"prompt": ["a fox", "b"], "max_tokens": 3, "echo": True, "logprobs": logprobs}
        whole = (await server.http.post(TEXT, json=body)).json()["choices"]
        texts, tokens = ["", ""], [0, 0]
        async for chunk in await server.openai.completions.create(model=MODEL, stream=True, **body):  # type: ignore[call-overload]
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            tokens[choice.index] += len(choice.logprobs.tokens) if choice.logprobs else 0
        assert texts == [choice["text"] for choice in whole]
        assert texts[0].startswith("a fox")
        if logprobs is not None:
            assert tokens == [len(choice["logprobs"]["tokens"]) for choice in whole]


async def test_tokens_can_be_named_by_their_ids(server: Serving) -> None:
    ids = server.tokenizer.encode("a fox")
    body = {"prompt": ids, "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    found = (await server.http.post(TEXT, json=body)).json()["choices"][0]["logprobs"]
    assert found["tokens"] == [f"token_id:{i}" for i in ids[:2]]
    assert f"token_id:{ids[0] + 1}" in found["top_logprobs"][0]
