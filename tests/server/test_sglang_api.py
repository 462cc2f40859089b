import itertools
import json

import pytest

from helpers.serving import CHAT_TEMPLATE, MODEL, Serving, events


async def test_generate_continues_texts_and_ids(server: Serving) -> None:
    ids = server.tokenizer.encode("a quick fox")
    params = {"max_new_tokens": 4, "temperature": 0, "sampling_seed": 3}
    text = server.tokenizer.decode(ids[:4])
    for prompt in ({"text": "a quick fox"}, {"input_ids": ids}):
        answer = (await server.http.post("/generate", json={**prompt, "sampling_params": params})).json()
        assert (answer["text"], answer["output_ids"]) == (text, ids[:4])
        meta = answer["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 4}
        counts = (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"])
        assert counts == (len(ids), 4, len(ids) // 2)
        assert meta["id"] == server.engine.seen[-1].id
        assert server.engine.seen[-1].params.seed == 3
    several = (await server.http.post("/generate", json={"text": ["a", "b"], "sampling_params": params})).json()
    assert [answer["text"] for answer in several] == ["aaaa", "bbbb"]
    twice = (await server.http.post("/generate", json={"text": "a", "sampling_params": {**params, "n": 2}})).json()
    assert [answer["index"] for answer in twice] == [0, 1]


@pytest.mark.serving(delay=0.005)
async def test_generate_streams_all_of_the_text_so_far(server: Serving) -> None:
    body = {"text": "a quick fox, and dogs", "sampling_params": {"max_new_tokens": 6}, "stream": True}
    response = await server.http.post("/generate", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    texts = [event["text"] for event in found]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == server.tokenizer.decode(server.tokenizer.encode("a quick fox, and dogs")[:6])
    assert [e["meta_info"]["finish_reason"] for e in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["meta_info"]["completion_tokens"] == 6


async def test_texts_and_conversations_are_tokenised_and_written_back(server: Serving) -> None:
    ids = server.tokenizer.encode("Grüße 世界")
    absent = {"add_special_tokens": None, "return_token_strs": None, "model": None}
    body = {"model": MODEL, "prompt": "Grüße 世界", "return_token_strs": True}
    found = (await server.http.post("/tokenize", json=body)).json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 128)
    assert found["token_strs"] == [server.tokenizer.backend.id_to_token(i) for i in ids]
    found = (await server.http.post("/tokenize", json={"prompt": "Grüße 世界", **absent})).json()
    assert (found["tokens"], found["token_strs"]) == (ids, None)
    for flag in ({}, {"skip_special_tokens": None}):
        back = await server.http.post("/detokenize", json={"tokens": ids, **flag})
        assert back.json() == {"prompt": "Grüße 世界"}
    messages = [{"role": "user", "content": "hello"}]
    for more in ({}, {"chat_template": None, **absent}):
        chat = (await server.http.post("/tokenize", json={"messages": messages, **more})).json()
        assert (chat["tokens"], chat["token_strs"]) == (server.tokenizer.encode_chat(messages), None)


@pytest.mark.serving(add_bos=True)
async def test_bos_is_added_to_a_text_unless_told_otherwise(server: Serving) -> None:
    ids = server.tokenizer.encode("hi")
    for special, tokens in ((None, ids), (True, ids), (False, ids[1:])):
        found = await server.http.post("/tokenize", json={"prompt": "hi", "add_special_tokens": special})
        assert found.json()["tokens"] == tokens


async def test_the_tokenizer_is_described_for_clients_that_render_themselves(server: Serving) -> None:
    assert (await server.http.get("/tokenizer_info")).json() == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE, "model_max_length": 128,
        "vocab_size": server.tokenizer.backend.get_vocab_size(),
    }  # fmt: skip


async def test_other_endpoints_are_refused_by_name(server: Serving) -> None:
    for path in ("/v1/responses", "/v1/audio/speech", "/v1/files/x/content", "/rerank", "/v1/nothing"):
        response = await server.http.post(path, json={})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "unsupported_endpoint")
        assert error["message"] == f"POST {path} is not supported by this server"
    with pytest.raises(Exception, match="embeddings is not supported"):
        await server.openai.embeddings.create(model=MODEL, input="x")


async def test_the_openapi_document_describes_bodies_answers_and_errors(server: Serving) -> None:
    found = (await server.http.get("/openapi.json")).json()
    paths = found["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/v1/models"} <= set(paths)
    schemas = found["components"]["schemas"]
    text = json.dumps(found)
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert "logit_bias" in schemas["ChatRequest"]["properties"]
    assert schemas["ChatRequest"]["additionalProperties"] == {"type": "null"}
    assert "additionalProperties" not in schemas["Message"]
    answers = paths["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    event = answers["text/event-stream"]["schema"]["properties"]["data"]
    assert event["anyOf"][0] == {"const": "[DONE]"}
    assert "ChunkChoice" in event["anyOf"][1]["contentSchema"]["anyOf"][0]["$ref"]
    roles = [["role", "content"], ["role"], ["role", "content", "tool_call_id"]]
    assert [role["required"] for role in schemas["Message"]["oneOf"]] == roles
    assert schemas["GenerateRequest"]["oneOf"][0]["required"] == ["text"]
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
    statuses = set(paths["/v1/chat/completions"]["post"]["responses"])
    assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= statuses
    assert (await server.http.get("/docs")).status_code == 404
