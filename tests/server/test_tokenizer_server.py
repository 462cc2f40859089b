"""A server with tokenizer processes: they die and are replaced, and none outlives the server."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from helpers.processes import BOUND, children, wait_for, wait_until_gone
from helpers.server_process import ask_for, running, server


def ask(url: str, path: str = "completions", **body: object) -> tuple[int, str]:
    """Status of an answer, and its finish reason or error code."""
    answer = httpx.post(f"{url}/v1/{path}", json={"max_tokens": 3, **body}, timeout=30)
    value = answer.json()
    return answer.status_code, value["error"]["code"] if "error" in value else value["choices"][0]["finish_reason"]


def test_answers_are_the_same_with_and_without_tokenizer_processes(tmp_path: Path) -> None:
    bodies = (
        ("completions", {"prompt": ["hello", "there"], "echo": True, "logprobs": 1, "seed": 3, "n": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hello"}], "seed": 3, "stream": True}),
        ("chat/completions", {"messages": [{"role": "alien", "content": "hello"}]}),
        ("completions", {"prompt": "x" * 9000}),
    )
    seen = []
    for count in (0, 2):
        with server(tmp_path / f"{count}" / "model", tmp_path / f"tmp{count}", num_tokenizer=count) as (process, url):
            assert len(children(process.pid)) == 1 + count
            seen.append([ask_for(url, path, body) for path, body in bodies])
    assert [status for status, _ in seen[0]] == [200, 200, 400, 400]
    assert seen[0] == seen[1]


def test_sigkill_of_a_tokenizer_fails_what_it_held_and_nothing_else(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", num_tokenizer=2) as (process, url):
        engine, *tokenizers = children(process.pid)
        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(ask, url, prompt="hello there", max_tokens=200) for _ in range(4)]
            wait_for(lambda: running(url) == 4)
            for pid in tokenizers:
                os.kill(pid, signal.SIGSTOP)
            held = [pool.submit(ask, url, prompt="hello there") for _ in range(16)]
            time.sleep(0.7)
            os.kill(tokenizers[0], signal.SIGKILL)
            wait_for(lambda: any(future.done() for future in held))
            failed = [future for future in held if future.done()]
            assert {future.result() for future in failed} == {(503, "tokenizer_unavailable")}
            assert len(failed) <= 4
            os.kill(tokenizers[1], signal.SIGCONT)
            codes = sorted(future.result(BOUND) for future in held)
            assert codes == [(200, "length")] * (16 - len(failed)) + [(503, "tokenizer_unavailable")] * len(failed)
            assert ask(url, prompt="hello there") == (200, "length")
            assert httpx.get(f"{url}/health").status_code == 200
            assert {future.result(20) for future in asked} == {(200, "length")}
            page = httpx.get(f"{url}/metrics").text
            assert f'request_rejected_total{{model_name="stub",reason="tokenizer_unavailable"}} {len(failed)}.0' in page
            assert 'num_requests_preparing{model_name="stub"} 0.0' in page
        wait_for(lambda: len(children(process.pid)) == 3)
        assert tokenizers[0] not in children(process.pid)
        wait_for(lambda: 'tokenizer_processes{model_name="stub"} 2.0' in httpx.get(f"{url}/metrics").text)
        assert running(url) == 0
        every = children(process.pid)
        process.terminate()
        assert process.wait(10) == 0
        wait_until_gone([engine, *every])
        assert process.stderr is not None
        assert "a tokenizer process ended with signal SIGKILL; another one is started" in process.stderr.read()


@pytest.mark.parametrize("busy", [False, True])
def test_sigkill_of_the_server_leaves_no_tokenizer(tmp_path: Path, busy: bool) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", num_tokenizer=2) as (process, url):
        every = children(process.pid)
        assert len(every) == 3
        with ThreadPoolExecutor(4) as pool:
            if busy:  # a conversation that takes a template seconds
                messages = [{"role": "user", "content": "hello there " * 20}] * 16000
                asked = [pool.submit(ask, url, "chat/completions", messages=messages) for _ in range(4)]
                time.sleep(1.0)
            process.kill()
            wait_until_gone(every)
            for future in asked if busy else ():
                assert future.exception(BOUND) is not None or future.result()[0] == 400


def test_when_the_engine_dies_the_tokenizers_go_too(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", num_tokenizer=1) as (process, _):
        engine, tokenizer = children(process.pid)
        os.kill(engine, signal.SIGKILL)
        assert process.wait(BOUND) == 1
        wait_until_gone([tokenizer])
        assert list((tmp_path / "tmp").iterdir()) == []
