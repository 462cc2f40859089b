"""The metrics as Prometheus reads them: the names vLLM uses, with the prefix `minisgl:`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from minisgl.core.types import EngineStats
from minisgl.server.metrics import Metrics
from minisgl.server.tally import Tally, process_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "minisgl:"

HISTOGRAMS = (
    ("time_to_first_token_seconds", "time_to_first_token", "from the arrival of a request to its first token"),
    ("inter_token_latency_seconds", "inter_token_latency", "from one token of a request to its next"),
    ("time_per_output_token_seconds", "time_per_output_token", "mean time of a token after the first, by request"),
    ("e2e_request_latency_seconds", "e2e_request_latency", "from the arrival of a request to its end"),
    ("request_queue_time_seconds", "queue_time", "from the arrival of a request to its place among the running"),
    ("request_prefill_time_seconds", "prefill_time", "from a request's place among the running to its first token"),
    ("request_decode_time_seconds", "decode_time", "from a request's first token to its last"),
    ("request_prompt_tokens", "prompt_tokens", "tokens of a request's prompt"),
    ("request_generation_tokens", "generation_tokens", "tokens generated for a request"),
)
"""Name, attribute of `Metrics`, and what is measured."""
GAUGES = (
    ("num_requests_running", "running", "requests that decode or prefill"),
    ("num_requests_waiting", "waiting", "requests that wait for a place, retracted ones included"),
    ("num_waiting_tokens", "waiting_tokens", "tokens of the requests that wait"),
    ("kv_pages_total", "pages_total", "KV pages there are"),
    ("kv_pages_free", "pages_free", "KV pages that hold nothing"),
    ("kv_pages_cached", "pages_cached", "KV pages in the prefix cache, whether a request uses them or not"),
)
"""Name, attribute of `EngineStats`, and what is counted."""
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "tokens of the prompts taken in"),
    ("generation_tokens", "generated_tokens", "tokens generated"),
    ("prefix_cache_queries", "prompt_tokens", "prompt tokens looked up in the prefix cache"),
    ("prefix_cache_hits", "cached_prompt_tokens", "prompt tokens found in the prefix cache"),
    ("num_preemptions", "retracted", "requests retracted because the KV pages ran out"),
    (
        "num_aborted_requests",
        "aborted",
        "requests ended before their end: by a client that left, a limit or an operator",
    ),
    ("engine_steps", "steps", "steps planned"),
)
"""Name without `_total`, attribute of `EngineStats`, and what is counted."""


class Page(Collector):
    """Everything there is to show at one moment; the engine's counts are those of its last answer."""

    def __init__(self, tally: Tally, stats: EngineStats, engine_up: bool, model: str) -> None:
        self.tally = tally
        self.stats = stats
        self.engine_up = engine_up
        self.model = model

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        tally, stats, shape = self.tally, self.stats, Metrics()
        labels, values = ["model_name"], [self.model]

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            family.add_metric(values, value)
            return family

        for name, attribute, text in GAUGES:
            yield gauge(name, text, getattr(stats, attribute))
        used = stats.pages_total - stats.pages_free
        held = used - stats.pages_cached
        yield gauge("kv_cache_usage_perc", "share of the KV pages that hold something", share(used, stats.pages_total))
        yield gauge("kv_cache_owned_perc", "share of the KV pages no other may have", share(held, stats.pages_total))
        yield gauge("num_requests_queued", "requests without their first token", tally.queued_requests)
        yield gauge("num_queued_tokens", "prompt tokens of requests without their first token", tally.queued_tokens)
        yield gauge("num_requests_preparing", "requests that are being tokenised", tally.preparing)
        yield gauge("tokenizer_processes", "tokenizer processes that are ready", tally.tokenizers)
        yield gauge("api_processes", "API processes that answer", tally.processes)
        yield gauge("engine_up", "1 while the engine lives", float(self.engine_up))
        for name, attribute, text in COUNTERS:
            counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
            counter.add_metric(values, getattr(stats, attribute))
            yield counter
        success = CounterMetricFamily(
            PREFIX + "request_success", "requests by how they ended", labels=[*labels, "finished_reason"]
        )
        for reason, count in tally.finished.items():
            success.add_metric([*values, reason], count)
        yield success
        rejected = CounterMetricFamily(
            PREFIX + "request_rejected", "requests turned away by a limit", labels=[*labels, "reason"]
        )
        for reason, count in tally.rejected.items():
            rejected.add_metric([*values, reason], count)
        yield rejected
        responses = CounterMetricFamily(
            PREFIX + "http_requests", "HTTP requests answered", labels=["method", "route", "status"]
        )
        for (method, route, status), count in tally.responses.items():
            responses.add_metric([method, route, str(status)], count)
        yield responses
        for name, attribute, text in HISTOGRAMS:
            bounds = getattr(shape, attribute).bounds
            family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
            counts, total = tally.histograms[attribute]
            family.add_metric(values, buckets(bounds, counts), total)
            yield family
        for shown in process_families():
            shown.samples = [sample._replace(value=tally.process[sample.name]) for sample in shown.samples]
            yield shown


def share(part: int, whole: int) -> float:
    """A part of a whole that may be empty."""
    return part / whole if whole else 0.0


def buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """The counts as Prometheus wants them: up to each bound, and `+Inf`."""
    found, total = [], 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
    return found


def render(tally: Tally, stats: EngineStats, engine_up: bool, model: str) -> bytes:
    """The page that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(Page(tally, stats, engine_up, model))
    return generate_latest(registry)
