"""Two replicas of the bundled model under Ray Serve, on the CPU: streams, faults, updates and scaling."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from helpers.processes import children, free_port, server, wait_for, wait_until_gone
from helpers.server_process import metrics
from minisgl.config import Config
from minisgl.core.types import EngineStats, Request, SamplingParams
from minisgl.ray_app import Scale, build, build_application

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]  # Ray's own warnings

STREAMS, CANCELLED = 64, 200
COMMAND = (sys.executable, "-c", "import sys; from minisgl.ray_app import main; sys.exit(main(sys.argv[1:]))")
SECONDS = 60.0  # in which a replica must have been replaced, or have been started or stopped
# Two engines share two cores, and a step computes in one thread.
SETTINGS = {"device": "cpu", "num_pages": 1024, "max_running_requests": 32, "max_prefill_length": 128}


class Application:
    """The application under a driver's Ray, which this process starts."""

    def __init__(self, url: str) -> None:
        self.url = url

    def deploy(self, **settings: Any) -> None:
        from ray import serve

        serve.run(build({**SETTINGS, **settings}), name="minisgl", route_prefix="/")

    def stats(self) -> list[EngineStats]:
        """Of each replica that runs."""
        from ray import serve

        replicas = serve.get_deployment_handle("Engine", "minisgl")
        return [reply.stats for reply in replicas.broadcast("query", "stats", 10.0, None).results(timeout_s=20)]

    def count(self) -> int:
        """Replicas that answer; -1 while one of them does not."""
        try:
            return len(self.stats())
        except Exception:
            return -1

    def processes(self, deployment: str) -> list[int]:
        found, name = [], f"ServeReplica:minisgl:{deployment}"
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if name in "".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def replicas(self) -> list[int]:
        return self.processes("Engine")

    def owns_nothing(self) -> bool:
        stats = self.stats()
        return all(each.running == each.waiting == each.pages_held == 0 for each in stats)

    def ask(self, number: int, max_tokens: int = 32, stream: bool = True) -> tuple[int, str]:
        """The status of an answer and its finish reason or error code; "cut off" for a stream without an end."""
        body = {"prompt": f"{number} bottles of beer on the wall,", "max_tokens": max_tokens, "stream": stream}
        answer = httpx.post(f"{self.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=300)
        if not stream or answer.status_code != 200:
            value = answer.json()
        elif not answer.text.endswith("data: [DONE]\n\n"):
            return answer.status_code, "cut off"
        else:
            value = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
        return answer.status_code, value["error"]["code"] if "error" in value else value["choices"][0]["finish_reason"]

    def load(self, count: int, max_tokens: int) -> list[Future[tuple[int, str]]]:
        pool = ThreadPoolExecutor(count)
        futures = [pool.submit(self.ask, number, max_tokens) for number in range(count)]
        pool.shutdown(wait=False)
        return futures


@pytest.fixture(scope="module")
def ray_serve() -> Iterator[str]:
    import ray
    from ray import serve

    port = free_port()
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def two(ray_serve: str) -> Application:
    application = Application(ray_serve)
    application.deploy(replicas=2)
    return application


def test_both_replicas_serve_many_streams(two: Application) -> None:
    before = [each.generated_tokens for each in two.stats()]
    assert Counter(each.result() for each in two.load(STREAMS, 32)) == {(200, "length"): STREAMS}
    after = [each.generated_tokens for each in two.stats()]
    assert sum(after) - sum(before) == STREAMS * 32
    assert min(after) > min(before)


def test_the_choices_of_a_request_and_the_prompts_of_a_list_are_generated_side_by_side(two: Application) -> None:
    body = {"prompt": [f"{number} is" for number in range(8)], "n": 2, "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{two.url}/v1/completions", json=body, timeout=60).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(16))
    assert answer["usage"]["completion_tokens"] == 64


def test_streams_that_clients_leave_free_their_pages(two: Application) -> None:
    def leave(number: int) -> None:
        body = {"prompt": f"{number} little ducks", "max_tokens": 1000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{two.url}/v1/completions", json=body, timeout=300) as stream:
            assert stream.status_code == 200
            next(stream.iter_bytes())

    aborted = sum(each.aborted for each in two.stats())
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(CANCELLED)))
    wait_for(two.owns_nothing, SECONDS)
    assert sum(each.aborted for each in two.stats()) - aborted == CANCELLED


def kill_replica(application: Application) -> int:
    return application.replicas()[0]


def kill_engine(application: Application) -> int:
    (engine,) = [
        child
        for child in children(application.replicas()[0])
        if "engine_process" in "".join(psutil.Process(child).cmdline())
    ]
    return engine


@pytest.mark.parametrize("victim", [kill_replica, kill_engine])
def test_a_replica_that_dies_takes_only_its_own_requests_with_it(
    two: Application, victim: Callable[[Application], int]
) -> None:
    answers, replica = two.load(STREAMS, 200), two.replicas()[0]
    wait_for(lambda: all(each.running > 8 for each in two.stats()), SECONDS)
    shares = [each.running + each.waiting for each in two.stats()]
    killed = time.monotonic()
    os.kill(victim(two), signal.SIGKILL)
    wait_until_gone([replica])
    wait_for(lambda: two.count() == 2, SECONDS)
    replaced = time.monotonic() - killed
    outcomes = Counter(each.result() for each in answers)
    print(json.dumps({"shares": shares, "outcomes": {str(k): v for k, v in outcomes.items()}, "replaced s": replaced}))
    finished = outcomes.pop((200, "length"))
    assert finished >= min(shares)
    assert set(outcomes) <= {(200, "engine_unavailable")}
    assert finished + outcomes.total() == STREAMS
    assert Counter(each.result() for each in two.load(8, 8)) == {(200, "length"): 8}
    wait_for(two.owns_nothing, SECONDS)


def test_the_requests_of_an_ingress_that_dies_free_their_pages(two: Application) -> None:
    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(two.ask, number, 900) for number in range(16)]
        wait_for(lambda: sum(each.running for each in two.stats()) == 16, SECONDS)
        os.kill(two.processes("Ingress")[0], signal.SIGKILL)
        for each in asking:
            assert each.exception() is not None  # cut off, or an error of Serve's proxy
    wait_for(two.owns_nothing, SECONDS)
    assert sum(each.aborted for each in two.stats()) >= 16
    wait_for(lambda: httpx.get(f"{two.url}/ready").status_code == 200, SECONDS)
    assert two.ask(0, 4) == (200, "length")


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_rolling_update_under_load_loses_no_request(two: Application, replicas: int) -> None:
    two.deploy(replicas=replicas)
    stop, outcomes = threading.Event(), Counter[tuple[int, str]]()

    def keep_asking(first: int) -> None:
        number = first
        while not stop.is_set():
            outcomes[two.ask(number, 24, stream=bool(number % 2))] += 1
            number += 8

    pool = ThreadPoolExecutor(8)
    asking = [pool.submit(keep_asking, first) for first in range(8)]
    wait_for(lambda: outcomes.total() >= 8, SECONDS)
    before = set(two.replicas())
    two.deploy(replicas=replicas, max_running_requests=16)
    after = set(two.replicas())
    asked = outcomes.total()
    wait_for(lambda: outcomes.total() >= asked + 8, SECONDS)
    stop.set()
    for each in asking:
        each.result()
    print(json.dumps({"requests": outcomes.total()}))
    assert not before & after
    assert outcomes == {(200, "length"): outcomes.total()}
    assert [each.max_running for each in two.stats()] == [16] * replicas


def test_replicas_follow_the_load_up_and_down(two: Application) -> None:
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 2}
    two.deploy(replicas="1:2", max_running_requests=4, **delays)
    wait_for(lambda: two.count() == 1, 2 * SECONDS)
    answers = two.load(STREAMS, 64)
    wait_for(lambda: two.count() == 2, 2 * SECONDS)
    assert Counter(each.result() for each in answers) == {(200, "length"): STREAMS}
    wait_for(lambda: two.count() == 1, 2 * SECONDS)
    assert two.ask(0, 4) == (200, "length")


def test_the_operators_endpoints_reach_every_replica(two: Application) -> None:
    two.deploy(replicas=2)
    assert Counter(each.result() for each in two.load(16, 8)) == {(200, "length"): 16}
    assert all(each.pages_cached > 0 for each in two.stats())
    count = sum(each.pages_cached for each in two.stats())
    assert metrics(two.url)["kv_pages_cached"] == count
    assert httpx.post(f"{two.url}/flush_cache").json()["flushed_pages"] == count
    assert all(each.pages_cached == 0 for each in two.stats())
    answers = two.load(8, 1000)
    wait_for(lambda: all(each.running for each in two.stats()), SECONDS)
    assert httpx.get(f"{two.url}/v1/loads").json()["aggregate"]["total_reqs"] == 8
    assert httpx.post(f"{two.url}/abort_request", json={"abort_all": True}).json()["aborted"] == 8
    assert {each.result() for each in answers} <= {(200, "request_aborted"), (499, "request_aborted")}


def test_each_replicas_gauges_are_on_rays_page(two: Application) -> None:
    import ray

    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def replicas_with(name: str) -> int:
        page = httpx.get(url).text
        return len(
            set(re.findall(rf'^ray_minisgl_{name}{{.*deployment="Engine".*replica="([^"]+)"', page, re.MULTILINE))
        )

    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_held_perc"):
        wait_for(lambda name=name: replicas_with(name) >= 2, SECONDS)  # type: ignore[misc]


def test_a_replicas_full_queue_is_the_apis_error(two: Application) -> None:
    two.deploy(replicas=1, max_running_requests=1, max_queued_requests=2)
    with ThreadPoolExecutor(16) as pool:
        body = {"prompt": "One, two,", "max_tokens": 50}
        url = f"{two.url}/v1/completions"
        answers = list(pool.map(lambda _: httpx.post(url, json=body, timeout=120), range(16)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {(429, "queue_full")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_requests_with_a_prefix_stay_with_the_replica_that_has_it(two: Application) -> None:
    two.deploy(replicas=2)
    for turn in range(8):
        for group in range(8):
            prefix = " ".join(f"rule {group * 1000 + number} holds for group {group};" for number in range(40))
            body = {"prompt": f"{prefix} question {turn}", "max_tokens": 1}
            assert httpx.post(f"{two.url}/v1/completions", json=body, timeout=60).status_code == 200
    stats = two.stats()
    rate = sum(each.cached_prompt_tokens for each in stats) / sum(each.prompt_tokens for each in stats)
    print(json.dumps({"hit rate": rate, "prompts": [each.prompt_tokens for each in stats]}))
    assert rate >= 0.8
    assert all(each.prompt_tokens for each in stats)


def test_several_ingresses_serve_and_refuse_to_show_the_metrics_of_one(two: Application) -> None:
    two.deploy(replicas=1, api_workers=2)
    assert Counter(each.result() for each in two.load(16, 8)) == {(200, "length"): 16}
    answer = httpx.get(f"{two.url}/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "unsupported_endpoint")


async def test_a_request_that_ends_on_its_way_is_no_load() -> None:
    from minisgl.ray_deployments import PrefixRequestRouter

    router: Any = object.__new__(PrefixRequestRouter)
    router.initialize_state()
    future = asyncio.get_running_loop().create_future()
    request = Request.make(id="x", prompt=[1], params=SamplingParams())
    pending = SimpleNamespace(args=[request], metadata=SimpleNamespace(internal_request_id="own"), future=future)
    await router.choose_replicas([SimpleNamespace(replica_id="a")], pending)
    assert router.places == {"own": "a"}
    future.cancel()
    await asyncio.sleep(0)
    assert not router.places


def test_a_replica_sees_all_of_its_gpus(ray_serve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts GPUs as it is told; this machine needs none."""
    from ray import serve

    from minisgl import ray_deployments

    class Replica:
        def __init__(self, config: Config) -> None:
            self.device = config.device

        def describe(self) -> tuple[str, str | None]:
            return self.device, os.environ.get("CUDA_VISIBLE_DEVICES")

    class Front:
        def __init__(self, replicas: Any, *_: Any) -> None:
            self.replicas = replicas

        async def __call__(self) -> Any:
            return await self.replicas.describe.remote()

    monkeypatch.setattr(ray_deployments, "EngineReplica", Replica)
    monkeypatch.setattr(ray_deployments, "Ingress", Front)
    front = serve.run(build_application(Config(tp=2), Scale(1, 1)), name="gpus", route_prefix=None)
    assert front.remote().result() == ("cuda", "0,1")
    serve.delete("gpus")


def test_the_command_says_why_a_replica_cannot_start() -> None:
    command = [*COMMAND, "--port", str(free_port()), "--device", "cpu", "--tp", "2"]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=240, check=False
    )
    assert done.returncode == 1
    assert "\nerror: --tp 2: LlamaForCausalLM cannot be split into 2" in done.stderr


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    with server("--device", "cpu", command=COMMAND) as (process, url):
        assert Application(url).ask(1, 4) == (200, "length")
    assert process.wait() == 0
