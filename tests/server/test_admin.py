"""The operator's endpoints."""

import asyncio
from pathlib import Path

import pytest

from helpers.serving import MODEL, Serving
from minisgl import __version__


async def test_ready_version_and_model(server: Serving, tmp_path: Path) -> None:
    assert (await server.http.get("/ready")).json() == {"status": "ready"}
    assert (await server.http.get("/version")).json() == {"version": __version__}
    assert (await server.http.get("/model_info")).json() == {
        "id": MODEL,
        "served_names": [MODEL],
        "model_path": str(tmp_path),
        "vocab_size": server.tokenizer.backend.get_vocab_size(),
        "max_model_len": 128,
        "eos_token_ids": [1],
        "has_chat_template": True,
        "tokenizer_path": str(tmp_path),
        "is_generation": True,
        "preferred_sampling_params": None,
    }
    server.client.fail()
    assert [(await server.http.get(path)).status_code for path in ("/ready", "/version")] == [503, 200]


@pytest.mark.serving(api_key=("hush-hush",), max_queued_requests=5)
async def test_server_info_has_the_configuration_and_no_secret(server: Serving) -> None:
    headers = {"Authorization": "Bearer hush-hush"}
    answer = await server.http.get("/server_info", headers=headers)
    info = answer.json()
    assert "hush" not in answer.text
    assert (info["config"]["api_key"], info["config"]["max_queued_requests"]) == ("1 set", 5)
    assert (info["effective"], info["stats"]["pages_total"], info["draining"]) == (["stub = on"], 100, False)
    assert info["queued"] == {"requests": 0, "tokens": 0}
    assert info["uptime"] >= 0


@pytest.mark.serving(delay=0.05)
async def test_an_aborted_answer_that_has_not_begun_is_an_error_that_nobody_retries(server: Serving) -> None:
    body = {"prompt": "hello", "max_tokens": 100}
    waiting = asyncio.create_task(server.http.post("/v1/completions", json=body))
    await server.until(lambda: len(server.engine.live) == 1)
    (request_id,) = server.engine.live
    assert (await server.http.post("/abort_request", json={"rid": request_id})).json() == {"aborted": 1}
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (499, "request_aborted")


NO_ORDERS = (
    b"", b"{}", b"[]", b'{"rid": 1}', b'{"rid": "a", "abort_all": true}', b'{"ids": []}', b"x" * 5000, b"\xff",
    b'{"rid": "\xff"}', b'{"rid": ""}', b'{"rid": null, "abort_all": false}', b"[" * 4000, b'{"abort_all": 1}',
)  # fmt: skip


async def test_what_abort_request_cannot_read_is_refused(server: Serving) -> None:
    for body in NO_ORDERS:
        answer = await server.http.post("/abort_request", content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body


async def test_abort_request_takes_what_sglangs_clients_send(server: Serving) -> None:
    for body in ({"rid": "", "abort_all": True}, {"abort_all": True, "message": None}, {"rid": "x", "abort_all": None}):
        assert (await server.http.post("/abort_request", json=body)).json() == {"aborted": 0}


@pytest.mark.serving(served_model_name=("first", "second"))
async def test_a_model_answers_to_each_of_its_names(server: Serving) -> None:
    cards = (await server.http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"]) for card in cards] == [("first", MODEL), ("second", MODEL)]
    for name, status in (("first", 200), ("second", 200), (MODEL, 404)):
        answer = await server.http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
        assert answer.status_code == status
        assert (await server.http.get(f"/v1/models/{name}")).status_code == status
