"""Several API processes in front of one engine look like one server, and die like one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.certificates import write_certificate
from helpers.processes import BOUND, children, descendants, wait_for, wait_until_gone
from helpers.server_process import ask, ask_for, kill_the_engine_under_load, load, server


def metrics(url: str) -> dict[str, float]:
    """Every sample, with its labels but the model's in the name."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            rest = [value for key, value in sorted(sample.labels.items()) if key != "model_name"]
            found[".".join([sample.name.removeprefix("minisgl:"), *rest])] = sample.value
    return found


def api_processes(pid: int) -> list[int]:
    """The API processes of a server, in the order of their rows."""
    module = b"minisgl.server.api_process"
    return [child for child in children(pid) if module in Path(f"/proc/{child}/cmdline").read_bytes()]


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
def test_an_answer_is_aborted_whichever_process_is_asked(tmp_path: Path, everything: bool) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (_, url):
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
        assert httpx.post(f"{url}/abort_request", json={"abort_all": True}).json() == {"aborted": 0}
        assert metrics(url)["request_success_total.abort"] == 4
        for client in clients:
            client.close()


def test_each_process_keeps_its_limits_and_all_are_counted(tmp_path: Path) -> None:
    slow = {"STUB_DELAY": "1.0"}
    with (
        server(tmp_path / "model", tmp_path / "tmp", environ=slow, api_workers=2, max_queued_requests=1) as (_, url),
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda _: ask(url, 1), range(16)))
        assert set(answers) == {(200, "length"), (429, "queue_full")}
        assert ask(url, 1) == (200, "length")
        page = metrics(url)
        assert page["request_rejected_total.queue_full"] == answers.count((429, "queue_full"))
        assert page["num_requests_queued"] == page["num_queued_tokens"] == 0


def test_sigkill_of_one_process_under_load_ends_its_requests_and_nothing_else(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, url):
        ended = metrics(url)["request_success_total.length"]
        futures = load(url, 8, 450)
        victim = max(api_processes(process.pid), key=lambda pid: len(os.listdir(f"/proc/{pid}/fd")))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in api_processes(process.pid))
        answers = [future.result(20) for future in futures]
        lost = [answer for answer in answers if answer != (200, "length")]
        assert 1 <= len(lost) <= 8
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


def test_processes_that_die_again_and_again_end_the_server(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, _):
        (engine,) = [pid for pid in children(process.pid) if pid not in api_processes(process.pid)]
        deadline = time.monotonic() + 60
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


def test_a_process_that_hangs_gets_no_connections_and_turns_health_red(tmp_path: Path) -> None:
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


def test_sigkill_of_the_engine_fails_everyone_at_once_and_nothing_stays(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, url):
        (engine,) = [pid for pid in children(process.pid) if pid not in api_processes(process.pid)]
        others = api_processes(process.pid)
        kill_the_engine_under_load(process, url, engine)
        wait_until_gone(others)
        assert list((tmp_path / "tmp").iterdir()) == []


def test_sigkill_of_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, url):
        every = descendants(process.pid)
        assert len(every) == 1 + 2
        futures = load(url, 4, 450)
        process.kill()
        wait_until_gone(every)
        assert {future.result(BOUND) for future in futures} == {(0, "closed")}


def test_sigterm_under_load_drains_all_processes(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2) as (process, url):
        every = children(process.pid)
        futures = load(url, 6, 200)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert {future.result(20) for future in futures} == {(200, "length")}
        assert process.wait(10) == 0
        wait_until_gone(every)
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("how", ["drain timeout", "second signal", "a process hangs"])
def test_a_drain_has_an_end(tmp_path: Path, how: str) -> None:
    timeout = 30.0 if how == "second signal" else 0.2
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2, drain_timeout=timeout) as (process, url):
        every, hung = children(process.pid), api_processes(process.pid)[0]
        futures = load(url, 4, 490)
        if how == "a process hangs":
            os.kill(hung, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        if how == "second signal":
            wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
            process.send_signal(signal.SIGTERM)
        codes = {future.result(10)[1] for future in futures}
        assert codes == {"engine_unavailable", *(("closed",) if how == "a process hangs" else ())}
        assert process.wait(2 * BOUND) == 0
        wait_until_gone(every)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_what_cannot_be_served_is_said_by_the_launcher(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), server(tmp_path / "a", tmp_path / "tmp", api_workers=2, mode="fail"):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []


def test_keys_reach_every_process_and_no_command_line(tmp_path: Path) -> None:
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2, api_key=["sesame"]) as (process, url):
        assert [httpx.get(f"{url}/v1/models").status_code for _ in range(4)] == [401] * 4
        headers = {"Authorization": "Bearer sesame"}
        assert [httpx.get(f"{url}/v1/models", headers=headers).status_code for _ in range(4)] == [200] * 4
        for pid in children(process.pid):
            assert b"sesame" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_tls_is_spoken_by_every_process(tmp_path: Path) -> None:
    certfile, keyfile = write_certificate(tmp_path)
    context = ssl.create_default_context(cafile=certfile)
    with server(tmp_path / "model", tmp_path / "tmp", api_workers=2, ssl_certfile=certfile, ssl_keyfile=keyfile) as (
        _,
        url,
    ):
        host, port = url.removeprefix("https://").split(":")
        for _ in range(4):
            assert httpx.get(f"{url}/version", verify=context).status_code == 200
            with socket.create_connection((host, int(port))) as stranger:  # not TLS: its connection is over
                stranger.sendall(b"GET /version HTTP/1.1\r\n\r\n")
                assert b"200" not in stranger.recv(100)
