"""What is counted of served requests, and the page that Prometheus reads. Times are s on the monotonic clock."""

import asyncio
import dataclasses
import functools
import glob
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from http import HTTPMethod
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from minisgl.core.types import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# By `--metrics-prefix`, the names that differ from ours; None: that prefix has another metric of this name.
NAMES: Mapping[str, Mapping[str, str | None]] = MappingProxyType({
    "minisgl": {},
    "vllm": {
        "kv_cache_usage_perc": None,
        "kv_cache_held_perc": "kv_cache_usage_perc",
        "time_per_output_token_seconds": "request_time_per_output_token_seconds",
    },
    "sglang": {
        "num_requests_running": "num_running_reqs",
        "num_requests_waiting": "num_queue_reqs",
        "kv_cache_held_perc": "token_usage",
        "kv_pages_total": "num_pages",
        "prefix_cache_hits": "cached_tokens",
        "num_preemptions": "num_retracted_requests",
        "request_success": "num_requests",
        "request_queue_time_seconds": "queue_time_seconds",
    },
})  # fmt: skip
# Upper bounds: s for the time of a token, s for what a request waits and takes, tokens of a prompt or completion.
SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
TOKENS = (1.0, 4.0, 16.0, *(float(2**n) for n in range(6, 18)))
BEAT_SECONDS = 0.5
SILENT_SECONDS = 3.0  # an API process whose heartbeat is older hangs


@dataclasses.dataclass(slots=True)
class RequestStats:
    prompt_tokens: int
    arrived: float  # when its HTTP request began
    admitted: float | None = None
    first: float | None = None  # when its first token came
    last: float = 0.0
    tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None


@dataclasses.dataclass(slots=True)
class AccessRecord:
    id: str
    method: str
    path: str
    client: str
    started: float = dataclasses.field(default_factory=time.monotonic)
    status: int = 0  # until the response begins
    choices: list[RequestStats] = dataclasses.field(default_factory=list)

    def describe(self, now: float) -> str:
        parts = [f'{self.client} "{self.method} {self.path}" {self.status} id={self.id}']
        if self.choices:
            prompt, cached = sum(c.prompt_tokens for c in self.choices), sum(c.cached_tokens for c in self.choices)
            parts.append(f"prompt={prompt} cached={cached} generated={sum(c.tokens for c in self.choices)}")
            if times := [c.admitted - c.arrived for c in self.choices if c.admitted is not None]:
                parts.append(f"queue={max(times):.3f}s")
            if times := [c.first - c.arrived for c in self.choices if c.first is not None]:
                parts.append(f"ttft={min(times):.3f}s")
            parts.append("finish=" + ",".join(c.finish or "none" for c in self.choices))
        return " ".join([*parts, f"total={now - self.started:.3f}s"])


# Of the HTTP request that the running task answers.
ACCESS_RECORD: ContextVar[AccessRecord | None] = ContextVar("minisgl_access_record", default=None)


class Metrics:
    """What one API process counts; a token costs one `observe`. Several keep their counts in the folder `counts`, each
    in files of its own; PROMETHEUS_MULTIPROC_DIR must have named it before prometheus_client was imported.
    """

    def __init__(self, counts: str | None = None, prefix: str = "minisgl") -> None:
        self.prefix = prefix
        self.registry = registry = CollectorRegistry()
        self.counts = counts
        self.collector = registry if counts is None else MultiProcessCollector(None, counts)  # type: ignore[no-untyped-call]

        def histogram(name: str, bounds: Sequence[float], text: str) -> Histogram:
            return Histogram(self.name(name), text, registry=registry, buckets=bounds)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(self.name(name), text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(self.name(name), text, registry=registry, multiprocess_mode="livesum")

        self.time_to_first_token = histogram("time_to_first_token_seconds", LONG, "from arrival to the first token")
        self.inter_token_latency = histogram("inter_token_latency_seconds", SHORT, "from one token to the next")
        self.time_per_output_token = histogram("time_per_output_token_seconds", SHORT, "by request, after the first")
        self.e2e_request_latency = histogram("e2e_request_latency_seconds", LONG, "from arrival to the end")
        self.queue_time = histogram("request_queue_time_seconds", LONG, "from arrival to a place among the running")
        self.prefill_time = histogram("request_prefill_time_seconds", LONG, "from there to the first token")
        self.decode_time = histogram("request_decode_time_seconds", LONG, "from the first token to the last")
        self.prompt_tokens = histogram("request_prompt_tokens", TOKENS, "tokens of a request's prompt")
        self.generation_tokens = histogram("request_generation_tokens", TOKENS, "tokens generated for a request")
        self.finished = counter("request_success", "requests by how they ended", "finished_reason")
        for reason in ("stop", "length", "abort", "timeout", "error"):
            self.finished.labels(reason)
        self.rejected = counter("request_rejected", "requests turned away by a limit", "reason")
        self.responses = counter("http_requests", "HTTP requests answered", "method", "route", "status")
        self.queued_requests = gauge("num_requests_queued", "requests without their first token")
        self.queued_tokens = gauge("num_queued_tokens", "prompt tokens of requests without their first token")
        self.preparing = gauge("num_requests_preparing", "requests that are being tokenised")
        # Of no registry: one API process has none, and of several the files are read.
        name, text = self.name("api_process_heartbeat"), "Unix time at which an API process last said that it works"
        self.heartbeat = Gauge(name, text, registry=None, multiprocess_mode="liveall")

    def name(self, own: str) -> str:
        return f"{self.prefix}:{NAMES[self.prefix].get(own, own)}"

    def on_tokens(self, request: RequestStats, count: int, now: float) -> None:
        if request.first is None:
            request.first = now
            self.time_to_first_token.observe(now - request.arrived)
        else:
            latency = (now - request.last) / count
            for _ in range(count):
                self.inter_token_latency.observe(latency)
        request.last = now
        request.tokens += count

    def on_end(self, request: RequestStats, finish: str, now: float) -> None:
        request.finish = finish
        self.finished.labels(finish).inc()
        self.e2e_request_latency.observe(now - request.arrived)
        self.prompt_tokens.observe(request.prompt_tokens)
        self.generation_tokens.observe(request.tokens)
        if request.admitted is not None:
            self.queue_time.observe(request.admitted - request.arrived)
        if request.first is not None:
            if request.admitted is not None:
                self.prefill_time.observe(request.first - request.admitted)
            self.decode_time.observe(request.last - request.first)
            if request.tokens > 1:
                self.time_per_output_token.observe((request.last - request.first) / (request.tokens - 1))

    def on_response(self, record: AccessRecord, route: str) -> None:
        method = record.method if record.method in set(HTTPMethod) else "other"  # a client can make up any number
        self.responses.labels(method, route, str(record.status)).inc()

    async def beat(self) -> None:
        while True:
            self.heartbeat.set_to_current_time()
            await asyncio.sleep(BEAT_SECONDS)

    def silences(self) -> dict[int, float]:
        """By process id how long ago (s) each API process said that it works."""
        if self.counts is None:
            return {os.getpid(): 0.0}
        files, now = glob.glob(f"{self.counts}/gauge_liveall_*.db"), time.time()
        samples = [s for family in MultiProcessCollector.merge(files) for s in family.samples]  # type: ignore[no-untyped-call]
        return {int(s.labels["pid"]): now - s.value for s in samples if s.value}

    def num_silent(self) -> int:
        return sum(seconds > SILENT_SECONDS for seconds in self.silences().values())


@dataclasses.dataclass(frozen=True)
class MetricsPage(Collector):
    metrics: Metrics
    stats: EngineStats  # what the engine said last
    engine_up: bool
    model: str
    page_size: int
    throughput: float = 0.0  # tokens/s since the page before

    def collect(self) -> Iterator[Metric]:
        stats, processes = self.stats, self.metrics.silences()
        used = stats.pages_total - stats.pages_free
        owned, answering = used - stats.pages_cached, sum(seconds <= SILENT_SECONDS for seconds in processes.values())
        held, hits = share(stats.pages_held, stats.pages_total), share(stats.cached_prompt_tokens, stats.prompt_tokens)
        gauges = (
            ("num_requests_running", "requests that decode or prefill", stats.running),
            ("num_requests_waiting", "requests that wait for a place, retracted ones included", stats.waiting),
            ("num_waiting_tokens", "tokens of the requests that wait", stats.waiting_tokens),
            ("kv_pages_total", "KV pages there are", stats.pages_total),
            ("kv_pages_free", "KV pages that hold nothing", stats.pages_free),
            ("kv_pages_cached", "KV pages in the prefix cache, whether a request uses them or not", stats.pages_cached),
            ("kv_cache_usage_perc", "share of the KV pages that hold something", share(used, stats.pages_total)),
            ("kv_cache_held_perc", "share of the KV pages that requests use", held),
            ("cache_hit_rate", "share of the prompt tokens found cached", hits),
            ("gen_throughput", "tokens/s since the page before", self.throughput),
            ("page_size", "tokens of a KV page", self.page_size),
            ("kv_cache_owned_perc", "share of the KV pages no other may have", share(owned, stats.pages_total)),
            ("api_processes", "API processes that answer", answering),
            ("engine_up", "1 while the engine lives", self.engine_up),
        )
        counters = (
            ("prompt_tokens", "tokens of the prompts taken in", stats.prompt_tokens),
            ("generation_tokens", "tokens generated", stats.generated_tokens),
            ("prefix_cache_queries", "prompt tokens looked up in the prefix cache", stats.prompt_tokens),
            ("prefix_cache_hits", "prompt tokens found in the prefix cache", stats.cached_prompt_tokens),
            ("num_preemptions", "requests retracted because the KV pages ran out", stats.retracted),
            ("num_aborted_requests", "requests aborted: by a client that left, a limit or an operator", stats.aborted),
            ("engine_steps", "steps planned", stats.steps),
        )
        renamed, name_of = NAMES[self.metrics.prefix], self.metrics.name
        families: list[Metric] = [
            GaugeMetricFamily(name_of(name), text, value)
            for name, text, value in gauges
            if renamed.get(name, "") is not None
        ]
        families += [CounterMetricFamily(name_of(name), text, value) for name, text, value in counters]
        labels = ("page_size", "num_pages") if self.metrics.prefix == "sglang" else ("block_size", "num_gpu_blocks")
        info = GaugeMetricFamily(name_of("cache_config_info"), "how the KV cache is divided: its labels", labels=labels)
        info.add_metric([str(self.page_size), str(stats.pages_total)], 1.0)
        families.append(info)
        for family in (*families, *self.metrics.collector.collect()):
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            if family.name != name_of("http_requests"):
                family.samples = [s._replace(labels={"model_name": self.model, **s.labels}) for s in family.samples]
            yield family
        yield from process_families(processes)


def process_families(pids: Iterable[int]) -> Iterable[Metric]:
    """CPU, memory and files of these processes together, as Prometheus names them; the start time is the earliest."""
    total: dict[str, Metric] = {}
    for pid in pids:
        for family in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
            before = total.setdefault(family.name, family)
            if before is not family:
                first, value = before.samples[0], family.samples[0].value
                both = min(first.value, value) if "start_time" in first.name else first.value + value
                before.samples = [first._replace(value=both)]
    return total.values()


def share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
