"""What clients of vLLM, SGLang and OpenAI send beside the plain request: accepted, and with the right values."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.engine_thread import EngineThread
from helpers.serving import MODEL, Serving, events, web
from helpers.templates import QWEN_TOOLS
from helpers.tiny_models import save_model
from minisgl.build import build_engine
from minisgl.config import Config

CHAT, TEXT, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CACHED = {"cache_control": {"type": "ephemeral"}}
SAID = "one two STOP three"


def user(**more: Any) -> dict[str, Any]:
    return {"role": "user", "content": "hello", **more}


def parts(**more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "hello", **more}]}


def assistant(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "hello", **more}


SAME_MESSAGES: dict[str, dict[str, Any]] = {
    "a type, as an evaluation harness adds": user(type="text"), "an unknown key": user(mood=1),
    "an unknown key that is null": user(mood=None), "a cached message": user(**CACHED),
    "an id and a time": user(id="msg_1", created_at=1.5, metadata={"a": [1]}),
    "known keys that are null": user(name=None, tool_calls=None, tool_call_id=None, refusal=None, audio=None),
    "empty lists": user(tool_calls=[], annotations=[]), "a part": parts(), "a cached part": parts(**CACHED),
    "a part with a role": parts(role="user", id=7, index=0), "a part with notes": parts(annotations=[{"a": 1}]),
    "a part with nulls of other types": parts(image_url=None, input_audio=None, logprobs=None),
    "an answer with what a proxy adds": assistant(provider_specific_fields={"x": None}, thinking_blocks=None),
    "an answer with what a reasoner adds": assistant(reasoning=None, reasoning_details=[], reasoning_content=None),
    "an answer with what a client parsed": assistant(parsed=None, refusal=None, audio=None, function_call=None),
}  # fmt: skip
"""Messages that mean what the plain one of their role means."""

SAME_BODIES: dict[str, dict[str, Any]] = {
    "an unknown null": {"colour": None}, "nulls of other servers": {"rid": None, "request_id": None, "min_x": None},
    "a null beside a format": {"response_format": {"type": "text", "json_schema": None, "colour": None}},
    "a null beside options": {"tools": None, "tool_choice": None, "stream_options": None, "functions": None},
    "no words": {"bad_words": [], "stop": None, "allowed_token_ids": None, "no_stop_trim": False},
    "defaults of vLLM": {
        "prompt_logprobs": None, "truncate_prompt_tokens": None, "include_stop_str_in_output": False,
        "return_token_ids": False, "spaces_between_special_tokens": True, "bad_words": [], "length_penalty": 1.0,
        "skip_special_tokens": True, "min_tokens": 0, "cache_salt": None, "mm_processor_kwargs": None,
    },
    "defaults of SGLang": {"regex": None, "ebnf": None, "json_schema": None, "no_stop_trim": False, "lora_path": None,
                           "session_params": None, "stop_regex": None, "separate_reasoning": True, "min_p": 0.0},
}  # fmt: skip


async def test_what_clients_add_changes_nothing(server: Serving) -> None:
    async def ask(messages: list[Any], **more: Any) -> tuple[int, Any, list[int]]:
        body = {"model": MODEL, "messages": messages, "max_tokens": 5, "seed": 1, **more}
        answer = await server.http.post(CHAT, json=body)
        return answer.status_code, answer.json().get("choices"), list(server.engine.seen[-1].prompt)

    plain = {role: await ask([{"role": role, "content": "hello"}]) for role in ("user", "assistant")}
    for name, message in SAME_MESSAGES.items():
        assert await ask([message]) == plain[message["role"]], name
        last = [{"role": "system", "content": "x"}, message, user()]
        assert (await ask(last))[0] == 200, name
        tokens = await server.http.post("/v1/tokenize", json={"messages": [message]})
        assert tokens.json()["tokens"] == plain[message["role"]][2], name
    for name, more in SAME_BODIES.items():
        assert await ask([user()], **more) == plain["user"], name


def get(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value.get(key, "absent")
    return value


Row = tuple[str, str, dict[str, Any] | None, dict[str, Any]]


def value_rows(server: Serving) -> Iterator[Row]:
    """Name, path, body, and what is at which place of the answer. The engine says SAID, then EOS."""
    encode, decode = server.tokenizer.encode, server.tokenizer.decode
    said, prompt = encode(SAID), encode("a quick fox")
    chat_prompt = encode("<|im_start|>user\nhello<|im_end|>\n")
    third, cut = said[2], decode(said[:2])
    stop, plain = {"stop": ["STOP"]}, {"max_tokens": 60}
    before, whole = "one two ", "one two STOP"
    for path, base, text in (
        (TEXT, {"prompt": "a quick fox"}, "choices.0.text"),
        (CHAT, {"messages": [user()]}, "choices.0.message.content"),
    ):
        reason, matched = "choices.0.stop_reason", "choices.0.matched_stop"
        ended: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("a stop string", stop, {text: before, reason: "STOP", matched: "STOP"}),
            ("one shown", {**stop, "include_stop_str_in_output": True}, {text: whole, reason: "STOP"}),
            ("one not trimmed", {**stop, "no_stop_trim": True}, {text: whole, matched: "STOP"}),
            ("EOS", {}, {text: SAID, reason: None, matched: 1}),
            ("EOS shown", {"include_stop_str_in_output": True, "skip_special_tokens": False},
             {text: SAID + "</s>", reason: None}),
            ("EOS shown but special", {"include_stop_str_in_output": True}, {text: SAID}),
            ("a stop token", {"stop_token_ids": [third]}, {text: cut, reason: third, matched: third}),
            ("a stop token shown", {"stop_token_ids": [third], "include_stop_str_in_output": True},
             {text: decode(said[:3]), reason: third}),
            ("its length", {"max_tokens": 2}, {text: cut, reason: None, matched: None}),
            ("a null reason", {"max_tokens": 2, "stop": None}, {"choices.0.finish_reason": "length"}),
            ("ids", {"return_token_ids": True, "max_tokens": 3}, {"choices.0.token_ids": said[:3]}),
            ("ids with the last", {"return_token_ids": True}, {"choices.0.token_ids": [*said, 1]}),
            ("no ids", {}, {"choices.0.token_ids": "absent", "prompt_token_ids": "absent"}),
            ("a short prompt", {"truncate_prompt_tokens": 2}, {"usage.prompt_tokens": 2}),
            ("a prompt that is short enough", {"truncate_prompt_tokens": 500}, {"usage.prompt_tokens": (
                len(prompt) if path == TEXT else len(chat_prompt))}),
            ("log-probabilities of no more", {"prompt_logprobs": 0, "max_tokens": 1}, {}),
        ]  # fmt: skip
        for name, more, expected in ended:
            yield f"{path}: {name}", path, {**base, **plain, **more}, expected
    own = {str(prompt[1]): {"logprob": -2.0, "rank": 2, "decoded_token": decode([prompt[1]])}}
    top = {str(prompt[1] + 1): {"logprob": -1.5, "rank": 1, "decoded_token": decode([prompt[1] + 1])}}
    alone = {str(prompt[1]): {**own[str(prompt[1])], "rank": None}}
    scores = "choices.0.prompt_logprobs"
    ids = {"prompt": prompt, "max_tokens": 2}
    long = {"prompt": "a b " * 400, "max_tokens": 2}
    text_rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("prompt ids", {"prompt": "a quick fox", "return_token_ids": True}, {"choices.0.prompt_token_ids": prompt}),
        ("prompt ids of ids", {**ids, "return_token_ids": True, "n": 2}, {"choices.1.prompt_token_ids": prompt}),
        ("scores of the prompt", {**ids, "prompt_logprobs": 2}, {f"{scores}.0": None, f"{scores}.1": {**top, **own}}),
        ("its own scores", {**ids, "prompt_logprobs": 0}, {f"{scores}.1": alone, "prompt_logprobs": "absent"}),
        ("nothing but scores", {**ids, "prompt_logprobs": 1, "max_tokens": 0},
         {"choices.0.text": "", "usage.completion_tokens": 0, f"{scores}.1": {**top, **alone}}),
        ("scores of several", {"prompt": ["x", "a quick fox"], "prompt_logprobs": 0}, {
            scores: [None, *([] if len(encode("x")) == 1 else [{}])], "choices.1.prompt_logprobs.1": alone}),
        ("more of the prompt than echoed", {**ids, "prompt_logprobs": 2, "echo": True, "logprobs": 0},
         {f"{scores}.1": {**top, **own}, "choices.0.logprobs.top_logprobs.1": {decode([prompt[1]]): -2.0}}),
        ("less than echoed", {**ids, "prompt_logprobs": 0, "echo": True, "logprobs": 1},
         {f"{scores}.1": alone, "choices.0.logprobs.token_logprobs.1": -2.0}),
        ("room for its tokens", {**long, "truncate_prompt_tokens": -1}, {"usage.prompt_tokens": 126}),
        ("what fits", {**long, "truncate_prompt_tokens": 100}, {"usage.prompt_tokens": 100}),
        ("an echo of what is left", {**ids, "prompt": "a quick fox", "truncate_prompt_tokens": 2, "echo": True},
         {"choices.0.text": decode(prompt[-2:]) + cut}),
    ]  # fmt: skip
    for name, body, expected in text_rows:
        yield f"completion: {name}", TEXT, body, expected
    hello = {"messages": [user()], "max_tokens": 2}
    yield "chat: prompt ids", CHAT, {**hello, "return_token_ids": True}, {"prompt_token_ids": chat_prompt}
    yield "chat: scores", CHAT, {**hello, "prompt_logprobs": 0}, {
        "prompt_logprobs.0": None, f"prompt_logprobs.1.{chat_prompt[1]}.logprob": -2.0,
    }  # fmt: skip
    yield from generate_rows(server, said, prompt)
    yield from admin_rows(server)


def generate_rows(server: Serving, said: list[int], prompt: list[int]) -> Iterator[Row]:
    decode = server.tokenizer.decode
    meta, logprobs, two = "meta_info", {"return_logprob": True}, {"max_new_tokens": 2, "temperature": 0}
    inputs = [[None, prompt[0], None], *([-1.0 - i, token, None] for i, token in enumerate(prompt[1:], start=1))]
    fox = {"text": "a quick fox", "sampling_params": two}
    nothing = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}, **logprobs}
    both = {"text": ["a quick fox", "x"], "sampling_params": two}
    length, limit = {"type": "length", "length": 0}, {"max_new_tokens": 60}
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("the whole prompt", {**fox, **logprobs, "logprob_start_len": 0}, {f"{meta}.input_token_logprobs": inputs}),
        ("from the second", {**fox, **logprobs, "logprob_start_len": 2}, {f"{meta}.input_token_logprobs": inputs[2:]}),
        ("no prompt", {**fox, **logprobs, "logprob_start_len": -1}, {f"{meta}.input_token_logprobs": []}),
        ("nothing", {**fox}, {f"{meta}.input_token_logprobs": "absent", f"{meta}.output_token_logprobs": "absent"}),
        ("likeliest", {**fox, **logprobs, "logprob_start_len": 0, "top_logprobs_num": 1},
         {f"{meta}.input_top_logprobs.0": None, f"{meta}.input_top_logprobs.1": [[-1.5, prompt[1] + 1, None]]}),
        ("a false beside the rest", {**fox, "return_logprob": False, "logprob_start_len": 3, "top_logprobs_num": 5,
                                     "return_text_in_logprobs": True}, {f"{meta}.output_token_logprobs": "absent"}),
        ("the prompt alone", {**nothing, "logprob_start_len": 0},
         {"text": "", "output_ids": [], f"{meta}.completion_tokens": 0, f"{meta}.finish_reason": length,
          f"{meta}.input_token_logprobs": inputs, f"{meta}.output_token_logprobs": []}),
        ("the prompt alone from one", {**nothing, "logprob_start_len": 1},
         {f"{meta}.input_token_logprobs": inputs[1:], f"{meta}.prompt_tokens": len(prompt)}),
        ("several", both, {"0.text": decode(said[:2]), "1.index": 1}),
        ("several alone", {**both, "sampling_params": {"max_new_tokens": 0}, **logprobs, "logprob_start_len": 0},
         {"0.text": "", "1.text": "", "0.meta_info.input_token_logprobs": inputs}),
        ("parameters of each", {**both, "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 3.0}]},
         {"0.output_ids": said[:1], "1.output_ids": said[:3]}),
        ("ids with theirs", {"input_ids": [prompt, [5]], "sampling_params": [limit, {**limit, "stop": "STOP"}]},
         {"0.text": SAID, "1.text": "one two "}),
        ("some parameters null", {**both, "sampling_params": [{**limit, "stop_regex": None, "colour": None}, limit]},
         {"0.text": SAID, "1.text": SAID}),
        ("several of each", {**both, "sampling_params": [{"n": 2, "max_new_tokens": 1}, {"n": 2, **limit}]},
         {"1.output_ids": said[:1], "2.output_ids": [*said, 1], "3.index": 3}),
        ("scores of one", {**both, "return_logprob": [True, False], "logprob_start_len": [0, 2]},
         {"0.meta_info.input_token_logprobs": inputs, "1.meta_info.output_token_logprobs": "absent"}),
        ("likeliest of each", {**both, **logprobs, "top_logprobs_num": [0, 1]},
         {"0.meta_info.output_top_logprobs": "absent",
          "1.meta_info.output_top_logprobs.0": [[-0.5, said[0] + 1, None]]}),
        ("an id", {**fox, "rid": "my-own"}, {f"{meta}.id": "my-own"}),
        ("an id of each", {**both, "rid": ["p", "q"]}, {"0.meta_info.id": "p", "1.meta_info.id": "q"}),
        ("one id of all", {**both, "rid": "p"}, {"0.meta_info.id": "p", "1.meta_info.id": "p"}),
        ("what is stopped at", {"text": "x", "sampling_params": {**limit, "stop": "STOP", "no_stop_trim": True}},
         {"text": "one two STOP", f"{meta}.finish_reason": {"type": "stop", "matched": "STOP"}}),
        ("a stop", {"text": "x", "sampling_params": {**limit, "stop": "STOP"}},
         {"text": "one two ", f"{meta}.finish_reason": {"type": "stop", "matched": "STOP"}}),
        ("EOS", {"text": "x", "sampling_params": limit},
         {"text": SAID, f"{meta}.finish_reason": {"type": "stop", "matched": 1}}),
        ("texts", {**fox, **logprobs, "return_text_in_logprobs": True, "top_logprobs_num": 2},
         {f"{meta}.output_token_logprobs": [[-1.0 - i, said[i], decode(said[i : i + 1])] for i in range(2)],
          f"{meta}.output_top_logprobs.1.0.0": -1.5, f"{meta}.output_top_logprobs.1.1.0": -2.0}),
        ("a null", {**fox, "colour": None, "rid": None, "image_data": None}, {"output_ids": said[:2]}),
        ("what SGLang's clients send at its defaults", {
            **fox, "stream": False, "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0,
            "token_ids_logprob": None, "lora_path": None, "return_hidden_states": False, "return_routed_experts": False,
            "sampling_params": {**two, "stop_regex": None, "stream_interval": None, "logit_bias": {"7": -5}},
        }, {f"{meta}.output_token_logprobs": "absent"}),
    ]  # fmt: skip
    for name, body, expected in rows:
        yield f"generate: {name}", GENERATE, body, expected


def admin_rows(server: Serving) -> Iterator[Row]:
    size = {"max_total_num_tokens": 1600, "context_length": 128, "tp_size": 1, "dp_size": 1}
    card = {"id": MODEL, "object": "model", "owned_by": "minisgl", "root": MODEL, "parent": None, "max_model_len": 128}
    load = {"dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": 480, "token_usage": 0.3,
            "max_total_num_tokens": 1600, "num_total_reqs": 0}  # fmt: skip
    ids = server.tokenizer.encode("hi there")
    yield "health", "/health", None, {"status": "ok"}
    yield "health by a token", "/health_generate", None, {"status": "ok"}
    yield "server", "/server_info", None, {"served_model_name": MODEL, **size}
    yield "server, SGLang's old name", "/get_server_info", None, {"served_model_name": MODEL, **size}
    yield "model, SGLang's old name", "/get_model_info", None, {"tokenizer_path": str(server.engine.folder)}
    yield "models", "/v1/models", None, {f"data.0.{name}": value for name, value in card.items()}
    yield "one model", f"/v1/models/{MODEL}", None, card
    yield "loads", "/v1/loads", None, {
        "dp_rank_count": 1, "aggregate.total_tokens": 480, **{f"loads.0.{name}": value for name, value in load.items()}
    }  # fmt: skip
    yield "load", "/load", None, {"server_load": 0}
    yield "tokens", "/v1/tokenize", {"prompt": "hi there", "messages": None}, {"tokens": ids, "max_model_len": 128}
    yield "text", "/v1/detokenize", {"tokens": ids}, {"prompt": "hi there"}


async def test_every_field_has_its_value_in_the_answer(server: Serving) -> None:
    server.speak(SAID)
    rows, wrong = list(value_rows(server)), []
    assert len(rows) >= 75
    assert len({name for name, *_ in rows}) == len(rows)
    for name, path, body, expected in rows:
        request = server.http.get(path) if body is None else server.http.post(path, json=body)
        answer = await request
        if answer.status_code != 200:
            wrong.append(f"{name}: {answer.status_code} {answer.text}")
            continue
        found = {place: get(answer.json(), place) for place in expected}
        wrong += [f"{name}: {place} is {found[place]}" for place in expected if found[place] != expected[place]]
    assert not wrong, "\n".join(wrong)
    assert server.client.num_live == 0


@pytest.mark.serving(delay=0.002)
@pytest.mark.parametrize("n", [1, 3])
async def test_streams_have_ids_and_reasons_once_and_the_role_counts_no_token(server: Serving, n: int) -> None:
    server.speak(SAID)
    said = [*server.tokenizer.encode(SAID), 1]
    more: dict[str, Any] = {"stream": True, "return_token_ids": True, "n": n, "max_tokens": 60}
    more["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    for path, base in ((CHAT, {"messages": [user()]}), (TEXT, {"prompt": "a quick fox"})):
        chunks = events((await server.http.post(path, json={**base, **more})).text)
        prompt = list(server.engine.seen[-1].prompt)
        shown = [(chunk, choice) for chunk in chunks for choice in chunk["choices"]]
        for index in range(n):
            own = [choice for _, choice in shown if choice["index"] == index]
            assert [token for choice in own for token in choice.get("token_ids", ())] == said
            ends = [(c["finish_reason"], c["stop_reason"], c["matched_stop"]) for c in own if "matched_stop" in c]
            assert ends == [("stop", None, 1)]
            if path == TEXT:
                assert [choice["prompt_token_ids"] for choice in own if "prompt_token_ids" in choice] == [prompt]
        if path == CHAT:
            assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [prompt]
            assert "prompt_token_ids" in chunks[0]
            roles = [chunk["usage"] for chunk, choice in shown if "role" in choice["delta"]]
            assert [usage["completion_tokens"] for usage in roles] == [0] * n
            assert {usage["total_tokens"] for usage in roles} == {len(prompt)}
        assert all(chunk["usage"]["prompt_tokens"] == len(prompt) for chunk in chunks)
        assert chunks[-1]["usage"]["completion_tokens"] == n * len(said)


@pytest.mark.serving(delay=0.002, max_seq_len=512)
async def test_an_own_id_may_be_used_again_and_aborts_what_it_names(server: Serving) -> None:
    def ask(rid: Any, **more: Any) -> asyncio.Task[Any]:
        body = {"text": "a b", "rid": rid, "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}, **more}
        return asyncio.create_task(server.http.post(GENERATE, json=body))

    several = {"text": ["a", "b"]}
    tasks = [ask("mine"), ask("mine"), ask("mine-1"), ask(["p", "q"], **several), ask("both", **several)]
    await server.until(lambda: len(server.engine.live) == 7)
    for rid, count in (("mine", 2), ("nobody", 0), ("p", 1), ("both", 2)):
        answer = await server.http.post("/abort_request", json={"rid": rid})
        assert answer.json() == {"aborted": count}, rid
    answers = await asyncio.gather(*tasks)
    assert [answer.status_code for answer in answers] == [499, 499, 200, 499, 499]
    assert answers[2].json()["meta_info"]["id"] == "mine-1"
    assert not server.engine.live


@pytest.mark.serving(health_timeout=0.3, max_live=2)
async def test_health_by_a_token_needs_one_in_time_of_this_request_or_of_another(server: Serving) -> None:
    server.engine.delay = 60.0
    answer = await server.http.get("/health_generate")
    assert (answer.status_code, "generated nothing" in answer.text) == (503, True)
    await server.until(lambda: not server.engine.live)


@pytest.mark.serving(delay=0.01, max_live=1, max_seq_len=512)
async def test_a_server_that_is_full_is_healthy_while_it_generates(server: Serving) -> None:
    body = {"prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True}
    async with server.http.stream("POST", TEXT, json=body) as answer:
        lines = answer.aiter_lines()  # dropped, it would close the connection
        await anext(lines)
        assert (await server.http.get("/load")).json() == {"server_load": 1}
        assert (await server.http.get("/v1/loads")).json()["aggregate"]["total_running_reqs"] == 1
        assert (await server.http.get("/health_generate")).status_code == 200
    server.client.fail()
    for path in ("/health_generate", "/v1/loads", "/load", "/get_server_info"):
        assert (await server.http.get(path)).status_code == 503


async def test_a_request_that_a_grammar_ends_without_a_token_has_no_stop_token(server: Serving) -> None:
    server.engine.end_silently = True
    limit = {"max_tokens": 4}
    rows: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"prompt": "a", **limit}), (CHAT, {"messages": [user()], **limit}),
        (GENERATE, {"text": "a", "sampling_params": {"max_new_tokens": 4}}),
    ]  # fmt: skip
    for path, body in rows:
        answer = (await server.http.post(path, json=body)).json()
        if path == GENERATE:
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}
        else:
            choice = answer["choices"][0]
            assert (choice["finish_reason"], choice["stop_reason"], choice["matched_stop"]) == ("stop", None, None)


@pytest.mark.serving(max_seq_len=2048)
async def test_an_evaluation_harness_runs_its_chat_and_its_likelihood_task(server: Serving) -> None:
    http, shots = server.http, [("2 + 2 = ?", "4"), ("3 + 5 = ?", "8")]
    turns = [{"role": "system", "content": "Answer with a number.", "type": "text"}]
    for question, answer in shots:
        turns += [
            {"role": "user", "content": f"Question: {question}\nAnswer:", "type": "text"},
            {"role": "assistant", "content": answer, "type": "text"},
        ]
    turns.append({"role": "user", "content": "Question: 4 + 5 = ?\nAnswer:", "type": "text"})
    server.speak("9\n\nQuestion: what next?")
    body = {
        "messages": turns, "model": MODEL, "max_tokens": 256, "temperature": 0, "seed": 1234,
        "stop": ["Question:", "</s>", "<|im_end|>"],
    }  # fmt: skip
    generated = (await http.post(CHAT, json=body)).json()
    assert [choice["message"]["content"] for choice in generated["choices"]] == ["9\n\n"]
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    assert list(server.engine.seen[-1].prompt) == server.tokenizer.encode_chat(plain)
    # Its likelihood task tokenises here, sends contexts with continuations as ids, and reads back their scores.
    info = (await http.get("/tokenizer_info")).json()
    assert {"bos_token", "eos_token", "chat_template", "tokenizer_class"} <= info.keys()
    ids = []
    for text in ("The capital of France is Paris", "Two and two is five"):
        found = await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
        ids.append(found.json()["tokens"])
    body = {"model": MODEL, "prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    scores = (await http.post(TEXT, json=body)).json()
    for prompt, choice in zip(ids, sorted(scores["choices"], key=lambda choice: choice["index"]), strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][:-1] == [None, *(-1.0 - i for i in range(1, len(prompt)))]
        assert all(max(top.values()) == -0.5 - i for i, top in enumerate(logprobs["top_logprobs"][1:-1], start=1))


@pytest.mark.serving(template=QWEN_TOOLS, max_seq_len=2048)
async def test_a_coding_assistant_caches_its_parts_and_sends_back_what_it_was_told(server: Serving) -> None:
    function = {"name": "read", "description": "Read a file", "parameters": {"type": "object"}, **CACHED}
    body: dict[str, Any] = {
        "model": MODEL, "max_tokens": 200, "stream": True, "stream_options": {"include_usage": True, "extra": None},
        "tools": [{"type": "function", "function": function, **CACHED}], "tool_choice": "auto", "user": None,
        "parallel_tool_calls": None, "functions": None, "response_format": None, "extra_headers": None,
    }  # fmt: skip
    history: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "You mend programs.", **CACHED}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Mend a.py."}, {"type": "text", "text": "Now.", **CACHED}],
        },
    ]
    server.speak('<tool_call>\n{"name": "read", "arguments": {"path": "a.py"}}\n</tool_call>')
    chunks = events((await server.http.post(CHAT, json={**body, "messages": history})).text)
    calls = [call for c in chunks for choice in c["choices"] for call in choice["delta"].get("tool_calls", ())]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    assert json.loads(arguments) == {"path": "a.py"}
    told = {
        "id": calls[0]["id"], "type": "function", "index": 0, "provider_specific_fields": {"signature": "x"},
        "function": {"name": "read", "arguments": arguments, "provider_specific_fields": None},
    }  # fmt: skip
    history += [
        {"role": "assistant", "content": None, "tool_calls": [told], "function_call": None, "annotations": [],
         "provider_specific_fields": {"refusal": None}, "reasoning_content": None, "thinking_blocks": None, **CACHED},
        {"role": "tool", "tool_call_id": told["id"], "name": "read", **CACHED,
         "content": [{"type": "text", "text": "x = 1", **CACHED}]},
        {"role": "user", "content": "Go on.", **CACHED},
    ]  # fmt: skip
    server.speak("Done.")
    chunks = events((await server.http.post(CHAT, json={**body, "messages": history})).text)
    said = "".join(choice["delta"].get("content", "") for c in chunks for choice in c["choices"])
    assert (said, chunks[-1]["usage"]["completion_tokens"] > 1) == ("Done.", True)
    prompt = server.tokenizer.decode(list(server.engine.seen[-1].prompt), skip_special_tokens=False)
    for word in ("You mend programs.", "Mend a.py.\nNow.", "a.py", "x = 1", "Go on."):
        assert word in prompt
    assert "ephemeral" not in prompt
    assert "signature" not in prompt


async def test_a_real_engine_scores_the_prompt_and_keeps_words_out(tmp_path: Path) -> None:
    built = build_engine(Config(model=str(save_model(tmp_path)), device="cpu", num_pages=64, max_seq_len_override=256))
    async with web(tmp_path, built.engine.model, EngineThread(built.engine).start) as side:

        async def ask(path: str, **body: Any) -> Any:
            answer = await side.http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        assert (await side.http.get("/health_generate")).status_code == 200
        prompt = side.tokenizer.encode("a quick fox")
        base = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        plain = (await ask(TEXT, **base, echo=True, logprobs=3))["choices"][0]
        both = (await ask(TEXT, **base, prompt_logprobs=3))["choices"][0]
        echoed = plain["logprobs"]["token_logprobs"][: len(prompt)]
        found = [own and own[str(token)]["logprob"] for token, own in zip(prompt, both["prompt_logprobs"], strict=True)]
        assert found == [None, *echoed[1:]]
        assert [len(top) in (3, 4) for top in both["prompt_logprobs"][1:]] == [True] * (len(prompt) - 1)
        limit = {"max_new_tokens": 0}
        scored = await ask(GENERATE, input_ids=prompt, sampling_params=limit, return_logprob=True, logprob_start_len=0)
        assert [entry[0] for entry in scored["meta_info"]["input_token_logprobs"]] == found
        ids = both["token_ids"]
        few = (await ask(TEXT, **base, allowed_token_ids=[7, 9, 11]))["choices"][0]
        assert set(few["token_ids"]) <= {7, 9, 11}
        texts = {token: side.tokenizer.decode([token]) for token in ids}
        words = [text for token, text in texts.items() if text.strip() and side.tokenizer.encode(text) == [token]]
        without = (await ask(TEXT, **base, bad_words=words))["choices"][0]
        assert words
        assert not any(word in without["text"] for word in words)
        stopped = (await ask(TEXT, **{**base, "ignore_eos": False}, stop_token_ids=[ids[3]]))["choices"][0]
        assert (stopped["stop_reason"], stopped["matched_stop"]) == (ids[3], ids[3])
    built.engine.close()
