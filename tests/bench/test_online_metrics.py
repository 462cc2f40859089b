"""Arithmetic on timings made by hand."""

import os
from array import array
from pathlib import Path

import numpy as np
import pytest

from minisgl_bench import metrics, online
from minisgl_bench.metrics import RequestRecord
from minisgl_bench.report import draw_file, draw_latencies


def record(sent: float, times: list[float], tokens: int, cached: int | None = 0, expected: int = 10) -> RequestRecord:
    return RequestRecord(
        0, due=sent, sent=sent, times=array("d", times), expected_input=10, expected_output=expected, prompt_tokens=10,
        completion_tokens=tokens, cached_tokens=cached, expected_cached=5,
    )  # fmt: skip


def test_latencies_are_from_sending_and_tokens_from_usage() -> None:
    one = record(100.0, [100.2, 100.3, 100.6], tokens=5)
    assert metrics.times_of(one) == pytest.approx({"ttft": 0.2, "tpot": 0.4 / 4, "e2e": 0.6})
    assert metrics.times_of(record(0.0, [1.0], tokens=1))["tpot"] is None


def test_figures_of_a_run() -> None:
    records = [
        record(1.0, [1.1, 1.3, 1.5], tokens=10, cached=4),
        record(2.0, [2.5, 2.6, 3.0], tokens=6, cached=2, expected=7),
        RequestRecord(2, sent=2.5, failure="HTTP 429", detail="too many"),
    ]
    found = metrics.figures(records, {"ttft": 0.3, "tpot": 0.1})
    assert found["failed"] == {"HTTP 429": 1}
    assert found["failure_examples"] == {"HTTP 429": "too many"}
    assert found["seconds"] == pytest.approx(2.0)
    assert (found["input_tokens"], found["output_tokens"]) == (20, 16)
    assert found["output_tokens_per_second"] == pytest.approx(8.0)
    assert found["total_tokens_per_second"] == pytest.approx(18.0)
    assert found["requests_per_second"] == pytest.approx(1.0)
    assert found["tokens_per_event"] == pytest.approx(16 / 6)
    assert (found["wrong_input_length"], found["wrong_output_length"]) == (0, 1)
    assert found["expected_hit_rate"] == pytest.approx(0.5)
    assert found["reported_hit_rate"] == pytest.approx(0.3)
    assert found["within_slo"] == pytest.approx(1 / 3)  # a failed request keeps no limit
    assert found["goodput_requests_per_second"] == pytest.approx(0.5)
    assert found["latency_ms"]["ttft"]["mean"] == pytest.approx(300)
    assert found["latency_ms"]["itl"]["p50"] == pytest.approx(200)
    assert found["latency_ms"]["e2e"]["max"] == pytest.approx(1000)


def test_quantiles_are_linear_between_values() -> None:
    found = metrics.spread(np.arange(101) / 1000)
    assert found == pytest.approx({"mean": 50, "p50": 50, "p90": 90, "p99": 99, "max": 100})
    assert metrics.spread(np.empty(0)) == {}


def test_a_server_that_does_not_report_cached_tokens_has_no_hit_rate() -> None:
    found = metrics.figures([record(0.0, [0.1], 1, cached=None), record(0.0, [0.1], 1)], {})
    assert found["reported_hit_rate"] is None
    assert "within_slo" not in found


def test_a_run_in_which_all_failed_has_figures(tmp_path: Path) -> None:
    found = metrics.figures([RequestRecord(0, failure="connect: ConnectionRefusedError")], {"ttft": 1.0})
    assert (found["seconds"], found["output_tokens_per_second"], found["goodput_requests_per_second"]) == (0, 0, 0)
    found["client"] = online.client_figures(online.ClientUsage(1.0, 0.1, array("d", [0.0])), [], 0)
    assert "0 of 1 requests" in metrics.lines(found)[0]
    assert any(line.startswith("failed: 1 × connect") for line in metrics.lines(found))
    runs, samples = [{"label": "one", **found}], [metrics.latencies([])]
    assert draw_file(tmp_path / "x.png", lambda figure: draw_latencies(figure, "none", runs, samples))


@pytest.mark.parametrize(
    ("cpu", "lag", "late", "reason"),
    [
        (2.0, 0.001, 0.001, None),
        (9.0, 0.001, 0.001, "CPU 0.90 of a core"),
        (2.0, 0.05, 0.001, "event loop lag p99 50.0 ms"),
        (2.0, 0.001, 0.3, "send lateness p99 300.0 ms"),
    ],
)
def test_the_client_says_when_it_was_the_bottleneck(cpu: float, lag: float, late: float, reason: str | None) -> None:
    sent = [RequestRecord(0, due=1.0, sent=1.0 + late)]
    found = online.client_figures(online.ClientUsage(10.0, cpu, array("d", [lag])), sent, 1000)
    assert found["cpu_us_per_output_token"] == pytest.approx(1000 * cpu)
    assert found["send_lateness_ms"]["p99"] == pytest.approx(1000 * late)
    assert [text.startswith(reason or "") for text in found["bottleneck"]] == [True] * (reason is not None)
    line = "the client was not the bottleneck: 0.20 of a core"
    assert online.client_line(found).startswith(f"the client was a bottleneck ({reason}" if reason else line)


def test_cores_are_told_by_process_and_busiest_thread() -> None:
    before = {1: online.ProcessCpu("api", 10.0, {1: 9.0, 2: 1.0})}
    after = {1: online.ProcessCpu("api", 12.0, {1: 10.9, 2: 1.1}), 5: online.ProcessCpu("engine", 1.0, {5: 1.0})}
    rows = online.cores_used(before, after, 2.0)
    assert [(row["name"], row["cores"]) for row in rows] == [("api", 1.0), ("engine", 0.5)]
    assert rows[0]["busiest_thread"] == pytest.approx(0.95)
    assert "api): 1.00 cores, its busiest thread takes 0.95, busy all the time" in online.server_line(rows[0])
    assert online.server_line(rows[1]).endswith("takes 0.50")


def test_this_process_is_found_with_its_threads() -> None:
    tree = online.process_tree(os.getpid())
    mine = tree[os.getpid()]
    assert mine.seconds > 0
    assert os.getpid() in mine.threads
    assert online.process_tree(2**30) == {}
