"""Several API processes in front of one engine look like one server."""

import json
import os
import re
import signal
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.certificates import write_certificate
from helpers.processes import BOUND, children, wait_for
from helpers.server_process import ask, ask_for, engine_of, metrics, server


def test_answers_are_the_same_with_one_process_and_with_three(tmp_path: Path) -> None:
    bodies = (
        ("completions", {"prompt": ["hello", "there"], "echo": True, "logprobs": 1, "seed": 3, "n": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}], "seed": 3, "stream": True}),
        ("chat/completions", {"messages": [{"role": "alien", "content": "hello"}]}),
    )
    seen = []
    for count in (1, 3):
        with server(tmp_path / f"{count}" / "model", tmp_path / f"tmp{count}", api_workers=count) as (process, url):
            assert len(children(process.pid)) == 1 + (count if count > 1 else 0)
            seen.append([ask_for(url, path, body) for path, body in bodies * count])
    assert [status for status, _ in seen[0]] == [200, 200, 400]
    assert seen[1] == seen[0] * 3


def test_connections_spread_and_metrics_are_those_of_the_whole(tmp_path: Path) -> None:
    slow = {"STUB_DELAY": "0.05"}
    with server(tmp_path / "model", tmp_path / "tmp", environ=slow, api_workers=3) as (process, url):
        with ThreadPoolExecutor(24) as pool:
            assert set(pool.map(lambda _: ask(url, 5), range(24))) == {(200, "length")}
        pages = [metrics(url) for _ in range(3)]
        for n, page in enumerate(pages):
            assert page["request_success_total.length"] == page["e2e_request_latency_seconds_count"] == 24
            assert page["request_generation_tokens_sum"] == page["generation_tokens_total"] == 24 * 5
            assert page["inter_token_latency_seconds_count"] == 24 * 4
            assert page["http_requests_total.POST./v1/completions.200"] == 24
            assert page.get("http_requests_total.GET./metrics.200", 0) == n
            assert page["api_processes"] == 3
            assert page["num_requests_running"] == page["num_requests_queued"] == 0
        assert pages[0]["process_cpu_seconds_total"] <= pages[1]["process_cpu_seconds_total"]
        assert pages[0]["process_start_time_seconds"] == pages[2]["process_start_time_seconds"]
        info = httpx.get(f"{url}/server_info").json()
        assert (info["config"]["api_workers"], info["stats"]["running"]) == (3, 0)
        assert httpx.get(f"{url}/ready").status_code == 200
        assert httpx.post(f"{url}/flush_cache").json() == {"flushed_pages": 7}
        process.terminate()
        _, log = process.communicate(timeout=10)
        served = re.findall(r" api-(\d) minisgl\.access: .*completions", log)
        assert len(served) == 24
        assert len(set(served)) > 1, "a burst is not one process' alone"


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_answer_is_aborted_by_its_id_or_with_all(tmp_path: Path, workers: int, everything: bool) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=workers) as (_, url):
        clients = [httpx.Client(timeout=20) for _ in range(4)]
        body = {"prompt": "hello there", "max_tokens": 450, "stream": True}
        streams, ids = [], []
        for client in clients:
            answer = client.send(client.build_request("POST", f"{url}/v1/completions", json=body), stream=True)
            streams.append(answer.iter_lines())
            ids.append(json.loads(next(streams[-1]).removeprefix("data: "))["id"])
        if everything:
            assert httpx.post(f"{url}/abort_request", json={"abort_all": True}).json() == {"aborted": 4}
        else:
            for answer_id in ids:
                assert httpx.post(f"{url}/abort_request", json={"rid": answer_id}).json() == {"aborted": 1}
        for lines in streams:
            rest = [line for line in lines if line]
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "request_aborted"
            assert rest[-1] == "data: [DONE]"
        assert httpx.post(f"{url}/abort_request", json={"abort_all": True}).json() == {"aborted": 0}
        assert metrics(url)["request_success_total.abort"] == 4
        for client in clients:
            client.close()


def test_each_process_keeps_its_limits_and_all_are_counted(tmp_path: Path) -> None:
    with (
        server(tmp_path / "model", tmp_path / "tmp", api_workers=2, max_queued_requests=1) as (process, url),
        ThreadPoolExecutor(16) as pool,
    ):
        engine = engine_of(process.pid)
        os.kill(engine, signal.SIGSTOP)  # so that nobody has a token before all have come
        try:
            asked = [pool.submit(ask, url, 1) for _ in range(16)]
            wait_for(lambda: sum(answer.done() for answer in asked) >= 14, 30)
        finally:
            os.kill(engine, signal.SIGCONT)
        answers = [answer.result(BOUND) for answer in asked]
        full = answers.count((429, "queue_full"))
        assert full in (14, 15), "a process may get no connection"
        assert answers.count((200, "length")) == 16 - full
        assert ask(url, 1) == (200, "length")
        page = metrics(url)
        assert page["request_rejected_total.queue_full"] == full
        assert page["num_requests_queued"] == page["num_queued_tokens"] == 0


def test_tls_is_spoken_by_every_process(tmp_path: Path) -> None:
    certfile, keyfile = write_certificate(tmp_path)
    context = ssl.create_default_context(cafile=certfile)
    tls: dict[str, Any] = {"ssl_certfile": certfile, "ssl_keyfile": keyfile}
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2, **tls) as (_, url):
        host, port = url.removeprefix("https://").split(":")
        for _ in range(4):
            assert httpx.get(f"{url}/version", verify=context).status_code == 200
            with socket.create_connection((host, int(port))) as stranger:  # not TLS: its connection is over
                stranger.sendall(b"GET /version HTTP/1.1\r\n\r\n")
                assert b"200" not in stranger.recv(100)
