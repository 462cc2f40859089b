"""Processes that die, hang or are told to go, under load: every client is answered, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from helpers.processes import BOUND, children, wait_for, wait_until_gone
from helpers.server_process import ask, kill_the_engine_under_load, load, server


def test_sigkill_of_the_engine_under_load_fails_everyone_at_once(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        (engine,) = children(process.pid)
        kill_the_engine_under_load(process, url, engine)
        assert list((tmp_path / "tmp").iterdir()) == []


def test_sigkill_of_the_server_under_load_leaves_no_engine(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        (engine,) = children(process.pid)
        futures = load(url, 4, 450)
        process.kill()
        wait_until_gone([engine])
        assert {future.result(BOUND) for future in futures} == {(0, "closed")}


@pytest.mark.parametrize("seconds", [1.5, pytest.param(10.0, marks=pytest.mark.soak)])
def test_an_engine_that_is_stopped_and_goes_on_loses_nothing(tmp_path: Path, seconds: float) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        (engine,) = children(process.pid)
        futures = load(url, 6, 200)
        os.kill(engine, signal.SIGSTOP)
        try:
            time.sleep(seconds)
            assert httpx.get(f"{url}/ready").status_code == 200
            assert httpx.get(f"{url}/version").status_code == 200
        finally:
            os.kill(engine, signal.SIGCONT)
        assert {future.result(20) for future in futures} == {(200, "length")}
        assert ask(url, 3) == (200, "length")


def test_sigterm_under_load_lets_answers_finish_and_takes_no_new_ones(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        (engine,) = children(process.pid)
        futures = load(url, 6, 200)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert {future.result(20) for future in futures} == {(200, "length")}
        assert process.wait(10) == 0
        wait_until_gone([engine])
        assert list((tmp_path / "tmp").iterdir()) == []


def test_the_drain_timeout_cuts_answers_short_with_an_error(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", drain_timeout=0.2) as (process, url):
        futures = load(url, 4, 490)
        process.send_signal(signal.SIGTERM)
        answers = [future.result(10) for future in futures]
        assert {code for _, code in answers} == {"engine_unavailable"}
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert "4 requests are cut short" in process.stderr.read()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        futures = load(url, 4, 490)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == 0
        assert {future.result(BOUND)[1] for future in futures} == {"engine_unavailable"}


def test_a_key_in_the_environment_guards_the_server_and_is_not_shown(tmp_path: Path) -> None:
    environ = {"MINISGL_API_KEY": "sesame-one, sesame-two"}
    with server(tmp_path / "model", tmp_path / "tmp", environ=environ) as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        for key in ("sesame-one", "sesame-two"):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert "sesame" not in httpx.get(f"{url}/server_info", headers=headers).text
        (engine,) = children(process.pid)
        assert b"sesame" not in Path(f"/proc/{engine}/cmdline").read_bytes()
        process.terminate()
        out, err = process.communicate(timeout=10)
        assert "sesame" not in out + err


def test_two_servers_of_one_model_do_not_disturb_each_other(tmp_path: Path) -> None:
    with (
        server(tmp_path / "model", tmp_path / "a") as (one, first),
        server(tmp_path / "model", tmp_path / "b") as (_, second),
    ):
        results: list[tuple[int, str]] = []
        thread = threading.Thread(target=lambda: results.append(ask(second, 100)))
        thread.start()
        assert ask(first, 3) == (200, "length")
        one.terminate()
        assert one.wait(10) == 0
        thread.join(20)
        assert results == [(200, "length")]


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), server(tmp_path / "model", tmp_path / "tmp", mode="fail"):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []


def test_nothing_listens_before_the_model_is_ready(tmp_path: Path) -> None:
    """A client that comes too early is refused at once rather than kept waiting."""
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/ready")
