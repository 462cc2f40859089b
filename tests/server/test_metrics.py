"""What is counted, and how Prometheus sees it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.serving import MODEL, Serving, serve_and
from minisgl.core.types import EngineStats, Request, SamplingParams
from minisgl.server.exposition import COUNTERS, GAUGES, HISTOGRAMS, buckets, share
from minisgl.server.metrics import Histogram, Metrics
from minisgl.server.records import Live
from minisgl.server.status import describe, report_status


def test_a_histogram_counts_up_to_and_including_each_bound() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.5, 4.0, 5.0):
        histogram.observe(value)
    histogram.observe(3.0, times=10)
    assert buckets(histogram.bounds, histogram.counts) == [("1.0", 2.0), ("2.0", 3.0), ("4.0", 14.0), ("+Inf", 15.0)]
    assert (histogram.count, histogram.sum) == (15, 42.0)


def test_the_times_of_a_request_are_those_between_its_events() -> None:
    metrics = Metrics()
    live = Live(Request.make(id="a-0", prompt=[1, 2, 3], params=SamplingParams()), None, 10.0)  # type: ignore[arg-type]
    metrics.on_admitted(live, 10.5)
    metrics.on_admitted(live, 99.0)  # retracted and admitted again
    metrics.on_tokens(live, 1, 12.0)
    metrics.on_tokens(live, 1, 12.5)
    metrics.on_tokens(live, 2, 13.5)
    metrics.on_end(live, "stop", 14.0)
    sums = {name: getattr(metrics, attribute).sum for name, attribute, _ in HISTOGRAMS}
    assert sums == {
        "time_to_first_token_seconds": 2.0,
        "inter_token_latency_seconds": 1.5,
        "time_per_output_token_seconds": 0.5,
        "e2e_request_latency_seconds": 4.0,
        "request_queue_time_seconds": 0.5,
        "request_prefill_time_seconds": 1.5,
        "request_decode_time_seconds": 1.5,
        "request_prompt_tokens": 3.0,
        "request_generation_tokens": 4.0,
    }
    assert metrics.inter_token_latency.count == 3
    assert metrics.finished == {"stop": 1, "length": 0, "abort": 0, "timeout": 0, "error": 0}


async def scrape(server: Serving) -> dict[str, float]:
    """Every sample of /metrics, with its labels but the model's in the name."""
    answer = await server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation, family.name
        for sample in family.samples:
            if sample.name.startswith("minisgl:") and "http" not in sample.name:
                assert sample.labels["model_name"] == MODEL
            rest = [value for key, value in sorted(sample.labels.items()) if key != "model_name"]
            found[".".join([sample.name.removeprefix("minisgl:"), *rest])] = sample.value
    return found


def test_the_metrics_are_those_of_the_requests_served(tmp_path: Path) -> None:
    async def check(server: Serving) -> None:
        text = "hello there"
        length = len(server.tokenizer.encode(text))
        for _ in range(3):
            await server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 5})
        await server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 60, "stop": ["there"]})
        await server.http.post("/v1/completions", json={"prompt": ""})
        left = asyncio.create_task(server.http.post("/v1/completions", json={"prompt": text, "max_tokens": 100}))
        await server.until(lambda: server.service.num_live == 1)
        left.cancel()
        await server.until(lambda: server.service.num_live == 0)
        await server.until(lambda: (*server.service.metrics.responses, ("POST", "/v1/completions", 499))[-1][2] == 499)
        found = await scrape(server)
        assert found["num_requests_running"] == 0
        assert found["kv_cache_usage_perc"] == 0.4
        assert found["kv_cache_owned_perc"] == 0.3
        assert found["engine_up"] == 1
        assert found["prompt_tokens_total"] == found["prefix_cache_queries_total"] == 5 * length
        assert found["prefix_cache_hits_total"] == 5 * (length // 2)
        assert found["num_preemptions_total"] == 2
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
        names = {name.partition(".")[0] for name in found}
        assert {f"{name}_total" for name, *_ in COUNTERS} <= names
        assert {name for name, *_ in GAUGES} <= names
        assert {f"{name}_bucket" for name, *_ in HISTOGRAMS} <= names

    serve_and(tmp_path, check, delay=0.003)


def test_metrics_are_shown_while_the_engine_is_deaf_or_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisgl.server.admin.SCRAPE_TIMEOUT", 0.1)

    async def check(server: Serving) -> None:
        assert (await scrape(server))["engine_up"] == 1
        server.engine.deaf = True
        assert (await scrape(server))["kv_pages_total"] == 100
        server.service.fail()
        assert (await scrape(server))["engine_up"] == 0

    serve_and(tmp_path, check)


def test_counting_a_token_costs_microseconds_at_most() -> None:
    metrics = Metrics()
    live = Live(Request.make(id="a-0", prompt=[1], params=SamplingParams()), None, 0.0)  # type: ignore[arg-type]
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for step in range(2000):
            metrics.on_tokens(live, 1, step * 0.01)
        best = min(best, (time.perf_counter() - started) / 2000)
    assert best < 20e-6, f"{best * 1e6:.2f} µs"


def test_the_status_line_is_said_under_load_and_not_when_idle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def check(server: Serving) -> None:
        reporting = asyncio.create_task(report_status(server.service, every=0.05))
        await asyncio.sleep(0.3)
        assert [r for r in caplog.records if r.name == "minisgl.status"] == []
        await server.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 50})
        await server.until(lambda: any(r.name == "minisgl.status" for r in caplog.records))
        reporting.cancel()

    with caplog.at_level("INFO", "minisgl"):
        serve_and(tmp_path, check, delay=0.005)


def test_the_status_line_says_rates_and_shares() -> None:
    before = EngineStats(prompt_tokens=100, cached_prompt_tokens=0, generated_tokens=50, retracted=1)
    now = EngineStats(
        running=3, waiting=2, pages_total=10, pages_free=4, pages_cached=1,
        prompt_tokens=300, cached_prompt_tokens=50, generated_tokens=90, retracted=3,
    )  # fmt: skip
    assert describe(before, now, 2.0) == (
        "running 3, waiting 2, KV owned 50%, cached 10%, prompt 100.0 tok/s, generated 20.0 tok/s, "
        "prefix hits 25%, retracted 2"
    )
    assert share(1, 0) == 0.0
