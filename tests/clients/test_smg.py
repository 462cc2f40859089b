"""smg, the Shepherd Model Gateway, before two servers: sessions, prefix affinity, and clients that leave."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from helpers.processes import free_port, server, wait_for
from helpers.server_process import metrics
from helpers.third_party import CLIENT_TESTS, SESSIONS, Clients

pytestmark = pytest.mark.clients

GROUPS, TURNS = 8, 8
DROPPED = 100


def owns_nothing(workers: list[str]) -> bool:
    found = [metrics(worker) for worker in workers]
    return all(each["kv_cache_held_perc"] == each["num_requests_running"] == 0 for each in found)


@pytest.fixture(scope="module")
def workers(flags: tuple[str, ...]) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(server(*flags, "--max-running-requests", "16"))[1] for _ in range(2)]


@pytest.fixture(scope="module")
def gateway(workers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = Path(os.environ.get("CLIENTS_VENV") or CLIENT_TESTS.parent.parent / ".venv-clients").absolute()
    port, log = free_port(), tmp_path_factory.mktemp("smg") / "log"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--policy"]
    command = [str(folder / "bin" / "smg"), "launch", *flags, "cache_aware", "--worker-urls", *workers]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def serves() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            listed = httpx.get(f"{url}/workers", timeout=5).json()["workers"]
        except (httpx.TransportError, ValueError):
            return False
        return len(listed) == len(workers) and all(worker["is_healthy"] for worker in listed)

    try:
        wait_for(serves, 60)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def model(url: str) -> str:
    return str(httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"])


def test_smg_knows_what_the_workers_serve(gateway: str, workers: list[str]) -> None:
    for worker in httpx.get(f"{gateway}/workers", timeout=10).json()["workers"]:
        (served,) = worker["models"]
        assert served["id"] == model(workers[0])
        assert worker["labels"]["max_model_len"] == str(served["context_length"])


@pytest.mark.parametrize("script", SESSIONS)
def test_a_clients_session_passes_through_smg(clients: Clients, gateway: str, script: str) -> None:
    assert tuple(clients.session(script, gateway)) == SESSIONS[script]


def test_requests_with_a_prefix_stay_with_the_worker_that_has_it(gateway: str, workers: list[str]) -> None:
    before = [metrics(worker) for worker in workers]
    name = model(gateway)
    for turn in range(TURNS):
        for group in range(GROUPS):
            prefix = " ".join(f"rule {group * 1000 + number} holds for group {group};" for number in range(40))
            body = {"model": name, "prompt": f"{prefix} question {turn}", "max_tokens": 1}
            assert httpx.post(f"{gateway}/v1/completions", json=body, timeout=60).status_code == 200
    after = [metrics(worker) for worker in workers]

    def gained(count: str) -> float:
        return sum(now[count] - then[count] for now, then in zip(after, before, strict=True))

    rate = gained("prefix_cache_hits_total") / gained("prefix_cache_queries_total")
    print(json.dumps({"hit rate": rate}))
    assert rate >= 0.8  # the first of a group finds nothing


def test_dropped_streams_free_their_pages(gateway: str, workers: list[str]) -> None:
    body = {"model": model(gateway), "prompt": "Once upon a time", "max_tokens": 1000, "stream": True}
    body["ignore_eos"] = True
    for _ in range(DROPPED):
        with httpx.stream("POST", f"{gateway}/v1/completions", json=body, timeout=60) as stream:
            assert stream.status_code == 200
            next(stream.iter_bytes())
    wait_for(lambda: owns_nothing(workers), 20)
    assert sum(metrics(worker)["request_success_total.abort"] for worker in workers) >= DROPPED
