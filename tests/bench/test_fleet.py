"""`minisgl simulate --replicas`: replicas under one clock, routers, repeated traffic, a replica that dies."""

import json
from pathlib import Path
from typing import Any

import pytest

from minisgl.config import Config
from minisgl.core.model_config import read_spec
from minisgl_bench import metrics, traffic
from minisgl_bench.command import ROUTER_NAMES
from minisgl_bench.command import main as bench
from minisgl_bench.cost_model import read_gpu
from minisgl_bench.simulation import ROUTERS, Clients, Replica
from minisgl_bench.traffic import Repeated, Session
from minisgl_bench.workload import WorkloadSpec

MODEL = Path(__file__).parents[2] / "benchmark" / "models" / "Qwen3-0.6B"
FLAGS = ["simulate", "--model", str(MODEL), "--rate", "40", "--requests", "60", "--output-len", "5:60"]


def fleet(count: int, **fields: Any) -> list[Replica]:
    first = Replica(read_spec(MODEL), Config(**fields), read_gpu("h200"))
    return [first, *(first.another() for _ in range(1, count))]


def workload(rate: float, count: int = 90) -> list[Session]:
    spec = WorkloadSpec(num_requests=count, input_len=(20, 600), output_len=(5, 60))
    return traffic.with_arrivals(traffic.from_workload(spec), rate, 1.0, 0)


def chats(rate: float = 20.0, count: int = 60) -> list[Session]:
    sessions = traffic.from_chats(0, count, 4, 6, 256, (20, 200), (5, 40), think=0.5)
    return traffic.with_arrivals(sessions, rate, 1.0, 0)


def played(clients: Clients) -> Clients:
    clients.run(lambda done: None)
    return clients


def runs_of(path: Path, *words: str) -> list[dict[str, Any]]:
    assert bench([*FLAGS, *words, "--json", str(path)]) == 0
    found: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return found


def test_every_router_that_can_be_named_exists() -> None:
    assert tuple(ROUTERS) == ROUTER_NAMES


@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_a_fleet_of_one_gives_the_figures_of_the_single_simulator(router: str, tmp_path: Path) -> None:
    single, one = (runs_of(tmp_path / "x.json", *words)[0] for words in ([], ["--replicas", "1", "--router", router]))
    for run in (single, one):
        for name in ("router", "label", "simulation_seconds"):
            del run[name]
    assert one == single


def test_each_replica_of_a_fleet_does_what_it_would_do_alone() -> None:
    sessions = workload(200.0)
    together = played(Clients(fleet(3), sessions)).records
    for first in range(3):
        alone = played(Clients(fleet(1), sessions[first::3])).records
        assert [record.times for record in together[first::3]] == [record.times for record in alone]


def test_prefixes_find_their_replica() -> None:
    rates = {}
    for name, make in ROUTERS.items():
        records = played(Clients(fleet(6), chats(), make(0))).records
        rates[name] = metrics.figures(records, {})["reported_hit_rate"]
    assert rates["prefix"] > 1.3 * max(rate for name, rate in rates.items() if name != "prefix")


def test_what_a_lost_replica_had_is_sent_again_and_nothing_is_left() -> None:
    clients = played(Clients(fleet(3), workload(300.0), ROUTERS["least-loaded"](0), lose=0.2))
    calm = played(Clients(fleet(3), workload(300.0), ROUTERS["least-loaded"](0)))
    assert 0 < clients.sent_again < 90
    assert calm.sent_again == 0
    assert all(len(record.times) == record.expected_output == record.completion_tokens for record in clients.records)
    assert all(record.times[0] > record.sent for record in clients.records)
    slow, fast = (metrics.figures(each.records, {})["latency_ms"]["e2e"]["p99"] for each in (clients, calm))
    assert slow > fast


def test_repeated_requests_are_of_new_users() -> None:
    base = chats(count=10)
    repeated = list(Repeated(base, 3))
    assert repeated[:10] == base
    assert [session.due for session in repeated] == sorted(session.due for session in repeated)
    hits = traffic.expected_hits((turn.segments for turn in traffic.all_turns(repeated)), 16)
    assert hits[:40] == hits[40:80] == hits[80:]
    assert sum(hits) > 0


def test_thinned_records_keep_all_figures_but_the_gaps_of_some() -> None:
    whole, thin = (
        metrics.figures(played(Clients(fleet(2), workload(100.0), every=every)).records, {"ttft": 0.02})
        for every in (1, 10)
    )
    for found in (whole, thin):
        assert found["latency_ms"].pop("itl")
    assert whole == thin


def test_a_grid_of_fleets_has_a_row_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--replicas", "2,3", "--router", "random,prefix", "--lose", "never,0.5", "--repeat", "2"]
    runs = runs_of(tmp_path / "grid.json", *flags)
    assert len({run["label"] for run in runs}) == 8
    assert all(run["requests"] == 120 and not run["failed"] for run in runs)
    assert (tmp_path / "grid.png").exists()
    whole = {(run["replicas"], run["router"]): run for run in runs if run["lose"] == "lose never"}
    for run in runs:
        hours = run["replicas"] * run["seconds"] / 3600 * 1e6 / run["output_tokens"]
        calm = run is whole.get((run["replicas"], run["router"]))
        assert (run["gpu_hours_per_million_output_tokens"] == pytest.approx(hours)) == calm
    assert "GPU h /" in capsys.readouterr().out.replace("\n", " ")
