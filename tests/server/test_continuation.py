"""What is shown of prompts and completions over HTTP, with a tokenizer whose words begin with their space."""

from typing import Any

import pytest

from helpers.serving import MODEL, Serving
from helpers.tiny_tokenizers import byte_fallback_json, byte_level_json, metaspace_json

STATES = {"byte fallback": byte_fallback_json(), "Metaspace": metaspace_json("always"), "byte level": byte_level_json()}
SPACED = [pytest.param(name, marks=pytest.mark.serving(state=state, max_seq_len=512)) for name, state in STATES.items()]
LLAMA = pytest.mark.serving(state=STATES["byte fallback"])


def say(server: Serving, text: str) -> None:
    """Say this after a prompt of `a`, then EOS."""
    whole, prompt = server.tokenizer.encode(f"a{text}", False), server.tokenizer.encode("a", False)
    server.engine.say = lambda request: whole[len(prompt) :]


async def complete(server: Serving, way: str, **params: Any) -> tuple[str, Any]:
    """The text of a completion, and what it stopped at as SGLang says it, or the reason as OpenAI does."""
    if way == "generate":
        answer = (await server.http.post("/generate", json={"text": "a", "sampling_params": params})).json()
        return answer["text"], answer["meta_info"]["finish_reason"]
    prompt: dict[str, Any] = {"prompt": "a"}
    if way == "chat/completions":
        prompt = {"messages": [{"role": "assistant", "content": "a"}], "continue_final_message": True}
        prompt["add_generation_prompt"] = False
    (choice,) = (await server.http.post(f"/v1/{way}", json={**prompt, **params})).json()["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"], choice["finish_reason"]


@pytest.mark.parametrize("way", ["completions", "generate", "chat/completions"])
@pytest.mark.parametrize("name", SPACED)
async def test_the_first_word_of_a_completion_keeps_its_space(server: Serving, name: str, way: str) -> None:
    say(server, " b he")
    assert (await complete(server, way))[0] == " b he"
    if way == "completions":
        stream = await server.openai.completions.create(model=MODEL, prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == " b he"
    for stop, text in ((" b", ""), (" he", " b"), ("b", " ")):
        shown, reason = await complete(server, way, stop=[stop])
        assert shown == text
        assert reason == ({"type": "stop", "matched": stop} if way == "generate" else "stop")


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("name", SPACED)
async def test_offsets_are_where_the_tokens_are_in_the_text(server: Serving, name: str, echo: bool) -> None:
    say(server, " b he")
    answer = await server.openai.completions.create(model=MODEL, prompt="a", echo=echo, logprobs=0)
    text, logprobs = answer.choices[0].text, answer.choices[0].logprobs
    assert text == ("a b he" if echo else " b he")
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    tokens = [entry for entry in zip(logprobs.tokens, logprobs.text_offset, strict=True) if entry[0][0] != "<"]
    assert "".join(token for token, _ in tokens).removeprefix(" ") == text.removeprefix(" ")
    assert all(text.startswith(token, offset) for token, offset in tokens[echo:])


IDS: list[Any] = [
    pytest.param(["<s>", "▁a", "▁b"], "<s> a b", marks=LLAMA),
    pytest.param(["▁a", "</s>", "<s>", "▁b"], "a</s><s> b", marks=LLAMA),
    pytest.param(["<s>"], "<s>", marks=LLAMA),
    pytest.param(["<s>", "a", "<|im_end|>", "b"], "<s>a<|im_end|>b"),
    pytest.param(["a", "b"], "ab"),
]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("tokens", "text"), IDS)
async def test_an_echo_of_ids_shows_every_token_that_logprobs_list(
    server: Serving, tokens: list[str], text: str, skip: bool
) -> None:
    ids = [server.tokenizer.backend.get_vocab()[token] for token in tokens]
    body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0, "skip_special_tokens": skip}
    (choice,) = (await server.http.post("/v1/completions", json=body)).json()["choices"]
    shown, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert choice["text"] == text
    assert "".join(shown).removeprefix(" ") == text
    ends = [*offsets[1:], len(text)]
    assert [text[start:end] for start, end in zip(offsets, ends, strict=True)] == [shown[0].lstrip(), *shown[1:]]
