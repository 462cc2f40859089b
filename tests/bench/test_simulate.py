"""`minisgl simulate`: its command line, virtual time, clients, and what a step costs."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.plan import StepPlan
from minisgl.core.types import Request, SamplingParams
from minisgl.errors import ConfigError
from minisgl_bench import metrics, traffic
from minisgl_bench.calibrate import REDUCED, GpuProbe, solve
from minisgl_bench.command import main
from minisgl_bench.command import simulate as command
from minisgl_bench.cost_model import CostModel, GpuConstants, gemm_seconds, gpu_names, read_gpu
from minisgl_bench.kernels import EXPERTS, layer_shapes
from minisgl_bench.simulated_executor import StepSeconds, TimedExecutor
from minisgl_bench.simulation import Clients, Replica
from minisgl_bench.traffic import Session
from minisgl_bench.workload import WorkloadSpec

MODELS = Path(__file__).parents[2] / "benchmark" / "models"
SMALL = ["--model", str(MODELS / "Qwen3-0.6B"), "--requests", "40", "--input-len", "20:600", "--output-len", "5:60"]


def spec(name: str = "Qwen3-0.6B") -> ModelSpec:
    return read_spec(MODELS / name)


def loads(**fields: Any) -> list[Session]:
    return traffic.from_workload(
        WorkloadSpec(**{"num_requests": 30, "input_len": (20, 600), "output_len": (5, 60), **fields})
    )


def played(replica: Replica, sessions: list[Session], concurrency: int | None = None) -> Clients:
    clients = Clients([replica], sessions, concurrency=concurrency)
    clients.run(lambda done: None)
    return clients


def report_of(path: Path, *words: str) -> Any:
    assert command([*SMALL, *words, "--json", str(path)]) == 0
    return json.loads(path.read_text())


# The command


def test_a_grid_has_a_run_for_each_combination_and_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rate=40", "--policy=fcfs,lpm:patience=5", "--max-running-requests=2,8", "--gpu=h200,a100"]
    runs = report_of(tmp_path / "grid.json", *flags)["runs"]
    assert len(runs) == len({run["label"] for run in runs}) == 8
    assert {run["config"]["schedule_policy"] for run in runs} == {"fcfs", "lpm:patience=5"}
    assert {run["config"]["max_running_requests"] for run in runs} == {2, 8}
    assert all(run["requests"] == 40 and not run["failed"] for run in runs)
    assert (tmp_path / "grid.png").exists()
    assert "NVIDIA A100-SXM4-80GB: not measured" in capsys.readouterr().out
    by_label = {run["label"]: run["latency_ms"]["e2e"]["p50"] for run in runs}
    slow, fast = (f"max running requests 8, fcfs, {gpu}" for gpu in ("a100", "h200"))
    assert by_label[slow] > 1.2 * by_label[fast]
    assert by_label["max running requests 2, fcfs, h200"] > 1.2 * by_label[fast]


def test_one_run_reports_what_bench_online_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report_of(tmp_path / "one.json", "--rate", "20", "--slo", "ttft=300ms")["runs"][0]
    assert {"ttft", "tpot", "itl", "e2e"} == set(found["latency_ms"])
    assert found["wrong_input_length"] == found["wrong_output_length"] == 0
    assert found["within_slo"] == 1.0
    assert found["tokens_per_event"] == 1.0
    assert found["seconds"] > 1.5
    printed = capsys.readouterr().out
    for words in ("time to first token", "prefix cache: 0.0%", "goodput at ttft 300 ms", "times real time"):
        assert words in printed


def test_the_same_command_gives_the_same_figures_with_hashed_tokens_too(tmp_path: Path) -> None:
    runs = [report_of(tmp_path / "x.json", "--rate", "30", *words)["runs"][0] for words in ((), (), ("--hash-tokens",))]
    assert len({json.dumps({**run, "simulation_seconds": 0}) for run in runs}) == 1


def test_a_policy_of_the_users_own_decides(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from minisgl.core.policy import Policy\n\n\nclass Longest(Policy):\n    def order(self, requests, view):\n"
        "        return sorted(requests, key=lambda request: -len(request.tokens))\n"
    )
    load = ["--concurrency", "40", "--max-running-requests", "2", "--policy", f"fcfs,srpf,{path}:Longest"]
    first, shortest, longest = (
        run["latency_ms"]["ttft"]["p50"] for run in report_of(tmp_path / "x.json", *load)["runs"]
    )
    assert shortest < first < longest


BAD = [
    (["--rate", "1", "--gpu", "tpu"], 1, "--gpu tpu: No such file or directory; known are a100, h100, h200"),
    (["--rate", "1", "--policy", "nonsense"], 2, "must be one of fcfs, lpm"),
    (["--rate", "1", "--policy", "lpm:patience=x"], 1, "the policy lpm:patience=x cannot be used"),
    (["--rate", "1", "--tp", "3"], 1, "cannot be split into 3"),
    (["--rate", "1", "--num-pages", "10"], 1, "longer than the 160 tokens"),
    (["--rate", "1", "--memory-ratio", "0.0001"], 1, "no KV page fits"),
    (["--rate", "1", "--model", "/nowhere"], 1, "no such file or folder"),
    (["--rate", "1", "--page-size", "16,x"], 2, "'16,x' is not made of numbers"),
    (["--rate", "1", "--page-size", "16,0"], 2, "--page-size must be between 1 and 256"),
    (["--rate", "1", "--url", "x"], 2, "unrecognized arguments: --url x"),
    (["--rate", "1", "--scale", "1"], 2, "--rate does not go with --scale"),
    (["--rate", "1", "--router", "best"], 2, "'best' is not one of random"),
    (["--rate", "1", "--replicas", "0"], 2, "is not a count of at least 1"),
    (["--rate", "1", "--lose", "1"], 1, "--lose needs --replicas of at least 2"),
    (["--rate", "1,2", "--trace-steps", "x"], 1, "--trace-steps is of one simulation, and these are 2"),
    ([], 2, "one of --trace, --rate, --concurrency is required"),
]


@pytest.mark.parametrize(
    ("words", "status", "said"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_run_is_told_in_one_line(
    words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["simulate", *SMALL, *words])
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == status
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line


# Virtual time


@pytest.mark.parametrize(("overlap", "seconds"), [(True, 5 * 0.010 + 0.003), (False, 5 * 0.013)])
def test_the_host_is_hidden_behind_the_device_only_with_overlap(overlap: bool, seconds: float) -> None:
    replica = Replica(spec(), Config(overlap=overlap, num_pages=100), read_gpu("h200"))
    replica.executor.cost = lambda plan: StepSeconds(0.002, 0.001, 0.010 if overlap else 0.011)
    replica.send(Request.make("a", [1] * 8, SamplingParams(max_tokens=5, ignore_eos=True)), 0.0)
    while replica.has_work:
        replica.step()
    assert replica.executor.now == pytest.approx(replica.gpu.request_seconds + seconds - overlap * 0.001)


def test_a_step_is_never_faster_than_its_launches() -> None:
    plans = []
    replica = Replica(spec(), Config(num_pages=100), read_gpu("h200"))

    def record(plan: StepPlan) -> StepSeconds:
        plans.append(plan)
        return StepSeconds(0.0, 0.0, 0.0)

    replica.executor.cost = record
    played(replica, loads(num_requests=1))
    executor = TimedExecutor(4, 10, lambda plan: StepSeconds(0.0, 0.005, 0.001))
    for number, plan in enumerate(plans[:3], 1):
        executor.launch(plan)
        assert executor.collect().step == plan.step
        assert executor.now == pytest.approx(0.005 * number)


def test_requests_come_at_their_times_and_an_idle_engine_waits() -> None:
    replica = Replica(spec(), Config(), read_gpu("h200"))
    sessions = traffic.with_arrivals(loads(num_requests=5), 0.5, float("inf"), 0)
    records = played(replica, sessions).records
    assert [record.sent for record in records] == [0.0, 2.0, 4.0, 6.0, 8.0]
    alone = [record.times[0] - record.sent for record in records]
    assert max(alone) < 0.03
    assert all(len(record.times) == record.expected_output == record.completion_tokens for record in records)


def test_a_closed_loop_never_has_more_requests_than_asked_for() -> None:
    replica = Replica(spec(), Config(), read_gpu("h200"))
    records = played(replica, loads(), 4).records
    times = [(record.sent, 1) for record in records] + [(record.times[-1], -1) for record in records]
    running = np.cumsum([change for _, change in sorted(times, key=lambda pair: (pair[0], pair[1]))])
    assert running.max() == 4
    assert metrics.figures(records, {})["seconds"] == replica.executor.now + replica.gpu.event_seconds


def test_turns_of_a_chat_wait_for_the_answer_and_find_their_history_cached() -> None:
    sessions = traffic.from_chats(0, 6, 3, 2, 256, (20, 60), (5, 20), think=2.0)
    sessions = traffic.with_arrivals(sessions, 1.0, 1.0, 0)
    hits = traffic.expected_hits((turn.segments for turn in traffic.all_turns(sessions)), 16)
    clients = Clients([Replica(spec(), Config(), read_gpu("h200"))], sessions, hits=hits)
    clients.run(lambda done: None)
    for first, second, third in (clients.records[3 * chat : 3 * chat + 3] for chat in range(6)):
        assert second.sent == pytest.approx(first.times[-1] + 2.0)
        assert third.sent == pytest.approx(second.times[-1] + 2.0)
        assert (second.cached_tokens or 0) >= 256
    assert sum(record.cached_tokens or 0 for record in clients.records) == sum(hits)


# What a step costs


def seconds_of(cost: CostModel, decodes: int, context: int, prompt: int = 0) -> float:
    return cost.layers_seconds(decodes + prompt) + cost.decode_attention(np.full(decodes, context, np.int32))


def cost_of(name: str = "Qwen3-14B", gpu: str = "h200", **fields: Any) -> CostModel:
    replica = Replica(spec(name), Config(num_pages=1000, **fields), read_gpu(gpu))
    return replica.cost


# bf16 GEMMs of an H200 in a CUDA graph, µs at 1, 64, 128, 256 and 4096 rows, November 2026.
GEMMS = {
    (7168, 5120): (25, 21, 24, 29, 446),
    (5120, 5120): (17, 17, 19, 25, 291),
    (34816, 5120): (90, 95, 95, 133, 2174),
    (5120, 17408): (54, 52, 56, 68, 1063),
    (151936, 5120): (371, 390, 423, 686, 9473),
    (151936, 1024): (77, 87, 91, 138, 1983),
}


@pytest.mark.parametrize(("shape", "measured"), GEMMS.items(), ids=lambda value: str(value))
def test_gemms_take_as_long_as_measured(shape: tuple[int, int], measured: tuple[int, ...]) -> None:
    gpu = read_gpu("h200")
    for rows, us in zip((1, 64, 128, 256, 4096), measured, strict=True):
        assert 1e6 * gemm_seconds(gpu, -(-rows // 64), *shape, 2) == pytest.approx(us, rel=0.3)


@pytest.mark.parametrize(("name", "ms"), [("Qwen3-0.6B", 5.39), ("Qwen3-14B", 18.3)])
def test_a_decode_step_of_256_rows_takes_as_long_as_measured(name: str, ms: float) -> None:
    cost = cost_of(name)
    assert 1e3 * (seconds_of(cost, 256, 610) + cost.head_seconds(256)) == pytest.approx(ms, rel=0.1)


def test_costs_grow_with_the_work_and_shrink_with_ranks() -> None:
    one, two = cost_of(), cost_of(tp=2)
    assert seconds_of(one, 64, 1000) < seconds_of(one, 64, 8000) < seconds_of(one, 64, 8000, prompt=2000)
    assert seconds_of(one, 64, 1000) > seconds_of(two, 64, 1000) > seconds_of(one, 64, 1000) / 2
    chunk, half = np.array([4096], np.int32), np.array([2048, 2048], np.int32)
    zero = np.zeros(2, np.int32)
    assert one.prefill_attention(zero[:1], chunk) > one.prefill_attention(zero, half)  # quadratic
    assert one.prefill_attention(chunk, chunk) > 2 * one.prefill_attention(zero[:1], chunk)


def test_fp8_halves_what_layers_and_caches_hold_and_the_head_stays() -> None:
    model, gpu = spec("Qwen3-14B"), read_gpu("h200")
    plain = Replica(model, Config(), gpu)
    kv = Replica(model, Config(kv_cache_dtype="fp8_e4m3"), gpu)
    weights = Replica(model, Config(quantization="fp8"), gpu)
    assert kv.num_pages == pytest.approx(2 * plain.num_pages, abs=1)
    assert kv.cost.kv_bytes * 2 == plain.cost.kv_bytes == weights.cost.kv_bytes
    saved = (weights.num_pages - plain.num_pages) * 40 * 16 * plain.cost.kv_bytes
    assert saved == pytest.approx(40 * 5120 * (128 * (2 * 40 + 2 * 8) + 3 * 17408), rel=1e-3)  # a byte a weight
    assert weights.cost.head_seconds(64) == plain.cost.head_seconds(64)
    reading = [replica.cost.layer_gemms(1) - 160 * gpu.gemm_seconds for replica in (plain, weights)]
    assert reading[0] / 2 < reading[1] < 0.55 * reading[0]
    assert weights.cost.layer_gemms(64) == pytest.approx(0.66 * plain.cost.layer_gemms(64), rel=0.02)  # computing


@pytest.mark.parametrize("config", [Config(quantization="fp8"), Config(kv_cache_dtype="fp8_e4m3")])
def test_fp8_is_refused_where_it_was_not_measured(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"A100.* without fp8_flops"):
        Replica(spec(), config, read_gpu("a100"))


def test_windows_bound_attention() -> None:
    gpu, full = read_gpu("h200"), spec()
    layers = (0, 128) * (full.num_layers // 2)
    narrow = msgspec.structs.replace(gpu, attention_seconds=0.0, prefill_attention_seconds=0.0)
    whole, mixed = (
        Replica(model, Config(num_pages=1000), narrow).cost
        for model in (full, type(full)(**{**vars(full), "windows": layers}))
    )
    lengths = np.array([4095, 99], np.int32)
    assert mixed.decode_attention(lengths) / whole.decode_attention(lengths) == pytest.approx(
        (4096 + 100 + 128 + 100) / 2 / (4096 + 100)
    )
    start, chunk = np.array([64], np.int32), np.array([1000], np.int32)
    inside = sum(min(position + 1, 128) for position in range(64, 1064))
    outside = sum(position + 1 for position in range(64, 1064))
    assert mixed.prefill_attention(start, chunk) / whole.prefill_attention(start, chunk) == pytest.approx(
        (inside + outside) / 2 / outside, rel=1e-6
    )


def test_every_gpu_has_its_figures_and_says_where_they_are_from() -> None:
    assert gpu_names() == ["a100", "h100", "h200"]
    assert [read_gpu(name).source.startswith("measured") for name in gpu_names()] == [False, False, True]


def test_a_file_with_other_fields_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match=r"mine.json: .*source"):
        read_gpu(str(path))


class ModelProbe(GpuProbe):
    """A GPU that takes exactly as long as the model says of the constants `gpu`."""

    def __init__(self, gpu: GpuConstants, ranks: int = 1) -> None:
        self.gpu, self.ranks = gpu, ranks

    def gemm(self, rows: int, outputs: int, inputs: int) -> float:
        fast = msgspec.structs.replace(self.gpu, read=1e20, gemm_seconds=0.0)
        return gemm_seconds(fast, -(-rows // 64), outputs, inputs, 2)

    def layer(self, model: str, rows: int) -> float:
        return sum(gemm_seconds(self.gpu, 1, n, k, 2) for n, k in layer_shapes(model))

    def decode(self, heads: int, kv_heads: int, rows: int, context: int) -> tuple[float, float]:
        moved = 2.0 * 2 * rows * context * kv_heads * 128 if rows > 1 else 0.0
        return moved / self.gpu.kv_read[heads // kv_heads] + self.gpu.attention_seconds, moved

    def prefill(self, heads: int, kv_heads: int, tokens: int) -> float:
        flops = 2 * heads * 128 * (tokens**2 - 64**2)
        return flops / self.gpu.attention_flops + self.gpu.prefill_attention_seconds

    def norm(self, rows: int, hidden: int) -> float:
        return 4 * rows * hidden * 2 / self.gpu.move

    def experts(self, rows: int) -> float:
        weights = 3 * 2048 * 768
        if rows == 256:
            return EXPERTS * weights * 2 / self.gpu.expert_read + 2 * self.gpu.gemm_seconds
        return 2 * rows * 8 * weights / self.gpu.expert_flops + 2 * self.gpu.gemm_seconds

    def gap(self) -> float:
        return self.gpu.gap_seconds

    def all_reduces(self) -> dict[str, Any] | None:
        if self.ranks == 1:
            return None
        each = 2 * (self.ranks - 1) / self.ranks * 5120 * 2
        nccl = {str(rows): 1e6 * (self.gpu.nccl_seconds + each * rows / self.gpu.link) for rows in REDUCED}
        fused = {"1": 1e6 * self.gpu.link_seconds, "1024": "too large"}
        other = {"all-reduce: torch.distributed": {**nccl, "1024": 9e9}, "all-reduce: broken": {**nccl, "1": "why"}}
        return {"tp": self.ranks, "hidden": 5120, **other, "all-reduce: nccl4py": nccl, "fused, one shot": fused}


@pytest.mark.parametrize("ranks", [1, 4])
def test_calibration_finds_the_constants_that_made_the_times(ranks: int) -> None:
    gpu = msgspec.structs.replace(
        read_gpu("h100"), kv_read={2: 2e12, 4: 2.1e12, 5: 2.2e12, 8: 1.5e12}, gap_seconds=1e-5
    )
    found = solve(ModelProbe(gpu, ranks), read_gpu("h200"), gpu.read)
    same = {name: getattr(read_gpu("h200"), name) for name in ("name", "source", "memory", "multiprocessors")}
    expected = msgspec.to_builtins(msgspec.structs.replace(gpu, **same))
    if ranks == 1:
        expected |= {name: getattr(read_gpu("h200"), name) for name in ("link", "link_seconds", "nccl_seconds")}
    for name, value in msgspec.to_builtins(found).items():
        assert value == (expected[name] if isinstance(value, str) else pytest.approx(expected[name], rel=1e-6)), name
