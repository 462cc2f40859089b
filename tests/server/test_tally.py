"""Counts of several processes add up to those of the server, and stay when a process is gone."""

from __future__ import annotations

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from minisgl.config import Config
from minisgl.core.types import EngineStats
from minisgl.server.api_messages import ApiSetup, Counted, FromApi
from minisgl.server.exposition import render
from minisgl.server.framing import HEAD, framed
from minisgl.server.limits import Limits, Queue
from minisgl.server.metrics import Metrics
from minisgl.server.records import Exchange
from minisgl.server.tally import NOTHING, Tally, total


def counted(times: list[float], finish: str, waiting: int) -> Tally:
    """What a process might have counted."""
    metrics, queue = Metrics(), Queue(Limits())
    for value in times:
        metrics.time_to_first_token.observe(value)
    metrics.finished[finish] += len(times)
    metrics.on_rejected("queue_full")
    metrics.on_response(Exchange("x", "GET", "/ready", "-", status=200), "/ready")
    metrics.preparing = 1
    for _ in range(waiting):
        queue.enter(5)
    return Tally.of(metrics, queue, tokenizers=2)


def samples(tally: Tally) -> dict[str, float]:
    """What /metrics shows of it."""
    page = render(tally, EngineStats(running=3), True, "m").decode()
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = [value for key, value in sorted(sample.labels.items()) if key != "model_name"]
            found[".".join([sample.name.removeprefix("minisgl:"), *labels])] = sample.value
    return found


def test_made_up_methods_are_counted_together() -> None:
    metrics = Metrics()
    for method in ("GET", "FOO", "BAR"):
        metrics.on_response(Exchange("x", method, "/", "-", status=404), "unmatched")
    assert metrics.responses == {("GET", "unmatched", 404): 1, ("other", "unmatched", 404): 2}


def test_counts_of_several_processes_add_up() -> None:
    one, other = counted([0.02, 0.3], "stop", waiting=1), counted([0.3, 700.0, 5.0], "length", waiting=2)
    found = samples(total([one, other]))
    assert found["time_to_first_token_seconds_count"] == 5
    assert found["time_to_first_token_seconds_sum"] == 0.02 + 0.3 + 0.3 + 700.0 + 5.0
    assert found["time_to_first_token_seconds_bucket.0.5"] == 3
    assert (found["request_success_total.stop"], found["request_success_total.length"]) == (2, 3)
    assert found["request_rejected_total.queue_full"] == found["http_requests_total.GET./ready.200"] == 2
    assert (found["num_requests_queued"], found["num_queued_tokens"], found["num_requests_preparing"]) == (3, 15, 2)
    assert (found["tokenizer_processes"], found["api_processes"], found["num_requests_running"]) == (4, 2, 3)
    assert found["process_resident_memory_bytes"] == 2 * one.process["process_resident_memory_bytes"]
    assert found["process_start_time_seconds"] == one.process["process_start_time_seconds"]


def test_what_a_process_had_counted_stays_and_what_it_had_goes() -> None:
    gone, left = counted([0.02, 0.3], "stop", waiting=1), counted([1.5], "length", waiting=0)
    found = samples(total([NOTHING, gone.settled, left]))
    assert found["time_to_first_token_seconds_count"] == 3
    assert found["request_success_total.stop"] == 2
    assert (found["num_requests_queued"], found["num_requests_preparing"]) == (0, 1)
    assert (found["tokenizer_processes"], found["api_processes"]) == (2, 1)
    assert found["process_open_fds"] == left.process["process_open_fds"]
    both = gone.process["process_cpu_seconds_total"] + left.process["process_cpu_seconds_total"]
    assert found["process_cpu_seconds_total"] == both


def test_a_tally_goes_through_a_pipe_unchanged() -> None:
    message = Counted(7, counted([0.02, 0.3], "stop", waiting=1))
    data = framed(message)
    assert HEAD.unpack(data[: HEAD.size]) == (len(data) - HEAD.size,)
    assert msgspec.msgpack.decode(data[HEAD.size :], type=FromApi) == message


def test_tokenizer_processes_are_shared_evenly() -> None:
    def shares(tokenizers: int, workers: int) -> list[int]:
        config = Config(num_tokenizer=tokenizers, api_workers=workers)
        setups = (
            ApiSetup(config=config, row=row, link=1, to_engine="", from_engine="", board="", connections=0, started=0.0)
            for row in range(workers)
        )
        return [setup.tokenizers for setup in setups]

    assert (shares(0, 3), shares(3, 3), shares(5, 3), shares(4, 1)) == ([0, 0, 0], [1, 1, 1], [2, 2, 1], [4])
