"""Processes that die, hang or are told to go, under load: every client is answered, and nothing stays behind."""

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from helpers.processes import BOUND, children, descendants, wait_for, wait_until_gone
from helpers.server_process import api_processes, ask, engine_of, load, metrics, server

both = pytest.mark.parametrize("workers", [1, 2])


@both
def test_sigkill_of_the_engine_under_load_fails_everyone_at_once(tmp_path: Path, workers: int) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=workers) as (process, url):
        others = api_processes(process.pid)
        futures = load(url, 8, 450)
        os.kill(engine_of(process.pid), signal.SIGKILL)
        answers = [future.result(BOUND) for future in futures]
        assert {code for _, code in answers} == {"engine_unavailable"}
        assert {status for status, _ in answers[0::2]} == {503}
        assert process.wait(BOUND) == 1
        assert process.stderr is not None
        assert "error: the engine process ended with signal SIGKILL" in process.stderr.read()
        wait_until_gone(others)
        assert list((tmp_path / "tmp").iterdir()) == []


@both
def test_sigkill_of_the_launcher_under_load_leaves_nothing(tmp_path: Path, workers: int) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=workers) as (process, url):
        every = descendants(process.pid)
        assert len(children(process.pid)) == (1 if workers == 1 else 1 + workers)
        futures = load(url, 4, 450)
        process.kill()
        wait_until_gone(every)
        assert {future.result(BOUND) for future in futures} == {(0, "closed")}


@pytest.mark.parametrize("seconds", [1.5, pytest.param(10.0, marks=pytest.mark.soak)])
def test_an_engine_that_is_stopped_and_goes_on_loses_nothing(tmp_path: Path, seconds: float) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        futures = load(url, 6, 200)
        os.kill(engine_of(process.pid), signal.SIGSTOP)
        try:
            time.sleep(seconds)
            assert httpx.get(f"{url}/ready").status_code == 200
            assert httpx.get(f"{url}/version").status_code == 200
        finally:
            os.kill(engine_of(process.pid), signal.SIGCONT)
        assert {future.result(20) for future in futures} == {(200, "length")}
        assert ask(url, 3) == (200, "length")


@both
def test_sigterm_under_load_lets_answers_finish_and_takes_no_new_ones(tmp_path: Path, workers: int) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=workers) as (process, url):
        every = descendants(process.pid)
        futures = load(url, 6, 200)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        assert {future.result(20) for future in futures} == {(200, "length")}
        assert process.wait(10) == 0
        wait_until_gone(every)
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("workers", "how"),
    [(1, "drain timeout"), (2, "drain timeout"), (1, "second signal"), (2, "second signal"), (2, "a process hangs")],
)
def test_a_drain_has_an_end(tmp_path: Path, workers: int, how: str) -> None:
    timeout = 30.0 if how == "second signal" else 0.2
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=workers, drain_timeout=timeout) as (process, url):
        every = descendants(process.pid)
        futures = load(url, 4, 490)
        if how == "a process hangs":
            os.kill(api_processes(process.pid)[0], signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        if how == "second signal":
            wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
            process.send_signal(signal.SIGTERM)
        codes = {future.result(10)[1] for future in futures}
        assert codes == {"engine_unavailable"} or (how == "a process hangs" and "closed" in codes)
        assert process.wait(2 * BOUND) == 0
        wait_until_gone(every)
        assert process.stderr is not None
        log = process.stderr.read()
        assert "Traceback" not in log
        assert how != "drain timeout" or "requests are cut short" in log


@both
def test_keys_guard_every_process_and_are_not_shown(tmp_path: Path, workers: int) -> None:
    environ = {"MINISGL_API_KEY": "sesame-one, sesame-two"}
    with server(tmp_path / "model", tmp_path / "tmp", environ=environ, api_workers=workers) as (process, url):
        for key, status in (("none", 401), ("sesame-one", 200), ("sesame-two", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert [httpx.get(f"{url}/v1/models", headers=headers).status_code for _ in range(3)] == [status] * 3
        assert "sesame" not in httpx.get(f"{url}/server_info", headers=headers).text
        for pid in children(process.pid):
            assert b"sesame" not in Path(f"/proc/{pid}/cmdline").read_bytes()
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


def test_sigkill_of_one_api_process_under_load_ends_its_requests_and_nothing_else(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, url):
        ended = metrics(url)["request_success_total.length"]
        futures = load(url, 8, 450)
        victim = max(api_processes(process.pid), key=lambda pid: len(os.listdir(f"/proc/{pid}/fd")))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in api_processes(process.pid))
        answers = [future.result(60) for future in futures]  # the others' 450 steps are slow on a busy machine
        lost = [answer for answer in answers if answer != (200, "length")]
        assert lost
        assert set(lost) == {(0, "closed")}
        wait_for(lambda: metrics(url)["api_processes"] == 2)
        assert {ask(url, 3) for _ in range(4)} == {(200, "length")}
        page = metrics(url)
        assert page["request_success_total.length"] >= ended + 8 - len(lost) + 4
        assert page["num_aborted_requests_total"] == len(lost)
        assert page["num_requests_running"] == page["num_requests_queued"] == page["num_queued_tokens"] == 0
        every = descendants(process.pid)
        process.terminate()
        _, log = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "ended with signal SIGKILL; its requests are ended, and another one is started" in log
        wait_until_gone(every)


def test_api_processes_that_die_again_and_again_end_the_server(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, _):
        engine, deadline = engine_of(process.pid), time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < deadline
            for pid in api_processes(process.pid):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert process.returncode == 1
        assert process.stderr is not None
        assert "the last of too many in 60 s" in process.stderr.read()
        wait_until_gone([engine])
        assert list((tmp_path / "tmp").iterdir()) == []


def test_an_api_process_that_hangs_gets_no_connections_and_turns_health_red(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, url):
        victim = api_processes(process.pid)[0]
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: httpx.get(f"{url}/health", timeout=10).status_code == 503)
        assert {ask(url, 3) for _ in range(6)} == {(200, "length")}
        assert httpx.get(f"{url}/health").json()["error"]["code"] == "api_process_unavailable"
        assert metrics(url)["api_processes"] == 1
        os.kill(victim, signal.SIGCONT)
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        assert metrics(url)["api_processes"] == 2
