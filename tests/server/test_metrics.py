"""What is counted, and how Prometheus sees it."""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import Counter, Histogram, generate_latest
from prometheus_client.multiprocess import mark_process_dead

from helpers.server_process import read_metrics
from helpers.serving import MODEL, Serving
from minisgl.core.types import EngineStats
from minisgl.server.launch import describe_load, report_status
from minisgl.server.metrics import SILENT_SECONDS, Metrics, MetricsPage, RequestStats, share


def request_stats() -> RequestStats:
    return RequestStats(prompt_tokens=3, arrived=10.0)


def test_the_times_of_a_request_are_those_between_its_events() -> None:
    metrics, request = Metrics(), request_stats()
    request.admitted = 10.5
    metrics.on_tokens(request, 1, 12.0)
    metrics.on_tokens(request, 1, 12.5)
    metrics.on_tokens(request, 2, 13.5)
    metrics.on_end(request, "stop", 14.0)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    sums = {sample.name.removeprefix("minisgl:"): sample.value for sample in samples if sample.name.endswith("_sum")}
    assert sums == {
        "time_to_first_token_seconds_sum": 2.0,
        "inter_token_latency_seconds_sum": 1.5,
        "time_per_output_token_seconds_sum": 0.5,
        "e2e_request_latency_seconds_sum": 4.0,
        "request_queue_time_seconds_sum": 0.5,
        "request_prefill_time_seconds_sum": 1.5,
        "request_decode_time_seconds_sum": 1.5,
        "request_prompt_tokens_sum": 3.0,
        "request_generation_tokens_sum": 4.0,
    }
    assert metrics.registry.get_sample_value("minisgl:inter_token_latency_seconds_count") == 3
    ended = {s.labels["finished_reason"]: s.value for s in samples if s.name == "minisgl:request_success_total"}
    assert ended == {"stop": 1, "length": 0, "abort": 0, "timeout": 0, "error": 0}


async def scrape(server: Serving) -> dict[str, float]:
    answer = await server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert set(re.findall(r'model_name="([^"]*)"', answer.text)) == {MODEL}
    return read_metrics(answer.text)


@pytest.mark.serving(delay=0.003)
async def test_the_metrics_are_those_of_the_requests_served(server: Serving) -> None:
    text = "hello there"
    length = len(server.tokenizer.encode(text))
    for _ in range(3):
        await server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 5})
    await server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 60, "stop": ["there"]})
    await server.http.post("/v1/completions", json={"prompt": ""})
    left = asyncio.create_task(server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 100}))
    await server.until(lambda: server.client.num_live == 1)
    left.cancel()
    await server.until(lambda: server.client.num_live == 0)
    labels = {"method": "POST", "route": "/v1/completions", "status": "499"}
    counts = server.client.metrics.registry
    await server.until(lambda: counts.get_sample_value("minisgl:http_requests_total", labels) == 1)
    found = await scrape(server)
    names = ("num_requests_running", "kv_cache_usage_perc", "kv_cache_owned_perc", "engine_up", "num_preemptions_total")
    assert [found[name] for name in names] == [0, 0.4, 0.3, 1, 2]
    assert found["prompt_tokens_total"] == found["prefix_cache_queries_total"] == 5 * length
    assert found["prefix_cache_hits_total"] == 5 * (length // 2)
    assert found["num_aborted_requests_total"] == len(server.engine.aborted)
    assert found["generation_tokens_total"] == server.engine.generated
    reasons = {r: found[f"request_success_total.{r}"] for r in ("stop", "length", "abort", "timeout", "error")}
    assert reasons == {"stop": 1, "length": 3, "abort": 1, "timeout": 0, "error": 0}
    assert found["time_to_first_token_seconds_count"] in (4, 5)
    assert found["e2e_request_latency_seconds_count"] == 5
    assert found["request_prompt_tokens_sum"] == 5 * length
    assert found["request_prompt_tokens_bucket.16.0"] == 5
    assert found["http_requests_total.POST./v1/completions.200"] == 4
    assert found["http_requests_total.POST./v1/completions.400"] == 1
    assert found["process_open_fds"] > 0
    shown = {name.partition(".")[0] for name in found}
    histograms = [f.name for f in Metrics().registry.collect() if f.type == "histogram"]
    assert len(histograms) == 9
    assert {f"{name.removeprefix('minisgl:')}_bucket" for name in histograms} <= shown


async def test_metrics_are_shown_while_the_engine_is_deaf_or_dead(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.server.admin.SCRAPE_TIMEOUT", 0.1)
    assert (await scrape(server))["engine_up"] == 1
    server.engine.deaf = True
    assert (await scrape(server))["kv_pages_total"] == 100
    server.client.fail()
    assert (await scrape(server))["engine_up"] == 0


def test_a_token_costs_one_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, request = Metrics(), request_stats()
    observed: list[float] = []
    monkeypatch.setattr(Histogram, "observe", lambda self, value: observed.append(value))
    monkeypatch.setattr(Counter, "labels", None)  # a label is looked up for no token
    for step in range(20):
        metrics.on_tokens(request, 1, 11.0 + step)
    assert observed == [1.0] * 20


def test_the_processes_of_a_server_are_counted_together(tmp_path: Path) -> None:
    """Each in a process of its own, as the launcher starts them; one has ended, one is starting, one hangs."""
    code = (
        "import os, sys, time\nfrom minisgl.server.metrics import Metrics, RequestStats\n"
        "metrics, request = Metrics(os.environ['PROMETHEUS_MULTIPROC_DIR']), RequestStats(2, 1.0)\n"
        "metrics.on_tokens(request, 1, 1.02)\nmetrics.on_end(request, 'stop', 1.5)\nmetrics.queued_tokens.set(7)\n"
        "metrics.rejected.labels('queue_full').inc()\n"
        "if age := float(sys.argv[1]):\n    metrics.heartbeat.set(time.time() - age)\n"
        "print(os.getpid())\n"
    )
    counts = str(tmp_path)
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": counts}
    ended, _, hanging, working = (
        int(subprocess.run([sys.executable, "-c", code, age], env=environ, capture_output=True, check=True).stdout)
        for age in ("0.1", "0", str(SILENT_SECONDS + 1), str(SILENT_SECONDS - 60))
    )
    mark_process_dead(ended, counts)  # type: ignore[no-untyped-call]
    metrics = Metrics(counts)
    assert (set(metrics.silences()), metrics.num_silent()) == ({hanging, working}, 1)
    page = generate_latest(MetricsPage(metrics, EngineStats(), True, "m", 16)).decode()
    for line in (
        'minisgl:time_to_first_token_seconds_bucket{le="0.025",model_name="m"} 4.0',
        'minisgl:request_success_total{finished_reason="stop",model_name="m"} 4.0',
        'minisgl:request_rejected_total{model_name="m",reason="queue_full"} 4.0',
        'minisgl:num_queued_tokens{model_name="m"} 21.0',
        'minisgl:api_processes{model_name="m"} 1.0',
    ):
        assert line in page.splitlines()
    assert "_created" not in page


@pytest.mark.serving(delay=0.005)
async def test_the_status_line_is_said_under_load_and_not_when_idle(
    server: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "minisgl")
    reporting = asyncio.create_task(report_status(server.client, every=0.05))
    nothing = EngineStats()
    for _ in range(3):
        server.client.stats = nothing
        await server.until(lambda: server.client.stats is not nothing)
    assert [r for r in caplog.records if r.name == "minisgl.status"] == []
    await server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 50})
    await server.until(lambda: any(r.name == "minisgl.status" for r in caplog.records))
    reporting.cancel()


def test_the_status_line_says_rates_and_shares() -> None:
    before = EngineStats(prompt_tokens=100, cached_prompt_tokens=0, generated_tokens=50, retracted=1)
    now = EngineStats(
        running=3, waiting=2, pages_total=10, pages_free=4, pages_cached=1,
        prompt_tokens=300, cached_prompt_tokens=50, generated_tokens=90, retracted=3,
    )  # fmt: skip
    assert describe_load(before, now, 2.0) == (
        "running 3, waiting 2, KV owned 50%, cached 10%, prompt 100.0 tok/s, generated 20.0 tok/s, "
        "prefix hits 25%, retracted 2"
    )
    assert share(1, 0) == 0.0


# What llm-d's endpoint picker (docs/plugin-metric-protocol.md) and AIBrix (features/multi-engine) read of each engine.
GATEWAY_NAMES = {
    "vllm": (
        "num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info",
        "num_preemptions_total", "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket",
        "prompt_tokens_total", "request_prompt_tokens_bucket", "generation_tokens_total",
        "request_generation_tokens_bucket", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "request_decode_time_seconds_bucket", "request_prefill_time_seconds_bucket",
        "request_time_per_output_token_seconds_bucket", "prefix_cache_queries_total", "prefix_cache_hits_total",
    ),
    "sglang": (
        "num_queue_reqs", "num_running_reqs", "token_usage", "cache_config_info", "page_size", "num_pages",
        "num_requests_total", "e2e_request_latency_seconds_bucket", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket", "gen_throughput", "cache_hit_rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("prefix", GATEWAY_NAMES)
def test_gateways_find_the_names_they_read(prefix: str) -> None:
    stats = EngineStats(pages_total=10, pages_free=2, pages_cached=5, pages_evictable=4)
    page = generate_latest(MetricsPage(Metrics(prefix=prefix), stats, True, "m", 16)).decode()
    names = {line.split("{")[0] for line in page.splitlines() if not line.startswith("#")}
    assert {f"{prefix}:{name}" for name in GATEWAY_NAMES[prefix]} <= names
    assert not any(name.startswith("minisgl:") for name in names)
    lines = {
        "vllm": ('vllm:kv_cache_usage_perc{model_name="m"} 0.4', 'block_size="16",model_name="m",num_gpu_blocks="10"'),
        "sglang": ('sglang:token_usage{model_name="m"} 0.4', 'model_name="m",num_pages="10",page_size="16"'),
    }[prefix]
    assert all(line in page for line in lines)
    assert page.count("# TYPE vllm:kv_cache_usage_perc gauge") == (prefix == "vllm")
