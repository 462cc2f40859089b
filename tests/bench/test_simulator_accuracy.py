"""Simulations against measurements: `benchmark/results` and the figures of an Azure trace, as in docs/simulator.md."""

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minisgl.config import Config
from minisgl.core.model_config import read_spec
from minisgl_bench import metrics, traffic
from minisgl_bench.cost_model import read_gpu
from minisgl_bench.simulation import Clients, Replica
from minisgl_bench.workload import WorkloadSpec

ROOT = Path(__file__).parents[2]
RESULTS, MODELS = ROOT / "benchmark" / "results", ROOT / "benchmark" / "models"
# One record is of an all-reduce that is gone.
OFFLINE = sorted(path.stem for path in RESULTS.glob("*.json") if re.search("offline|64-rows(?!-symm)|-fp8", path.stem))
# Qwen3-32B on four H200s, the first 1,000 requests of the Azure trace, answers of at most 1,024 tokens, no prefix
# cache, November 2026: scale and prefill budget; median TTFT and TPOT in ms, output tokens/s.
AZURE = {
    (0.5, 8192): (71, 11.7, 2231),
    (0.5, 16384): (69, 11.6, 2232),
    (0.25, 8192): (262, 34.2, 3873),
    (0.25, 16384): (296, 36.4, 3817),
}
LATER = {"Qwen3-32B-tp4-4xH200-offline": 8748}  # output tokens/s of 28 November, of which there is no record
# Of `bench ablation`, where the host's part of a step shows: record, group, label. Other rows scatter too much there.
ABLATIONS = [
    ("Qwen3-0.6B-H200-ablation-chunks", "chunk-size", "512"),
    ("Qwen3-0.6B-H200-ablation", "chunk-size", "4096"),
    ("Qwen3-0.6B-H200-ablation", "chunk-size", "16384"),
    ("Qwen3-0.6B-H200-ablation", "chunk-size", "32768"),
    ("Qwen3-0.6B-H200-ablation", "graphs", "off"),
]
LIMITS = {"TTFT p50, ms": 0.15, "TPOT p50, ms": 0.15, "output tokens/s": 0.10}


def record(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def check(title: str, simulated: float, measured: float, name: str = "output tokens/s") -> None:
    """The simulated figure is close to the measured one, and the page says what both are now."""
    digits = 1 if simulated < 100 else 0
    line = f"| {title} | {name} | {simulated:,.{digits}f} | {measured:,.{digits}f} | {simulated / measured:.2f} |"
    assert simulated == pytest.approx(measured, rel=LIMITS[name]), line
    page = (ROOT / "docs" / "simulator.md").read_text()
    told = re.search(re.escape(f"| {title} | {name} | ") + r"([0-9,.]+) \| ([0-9,.]+) \|", page)
    assert told is not None, line
    shown = [float(figure.replace(",", "")) for figure in told.groups()]
    assert shown[0] == pytest.approx(simulated, rel=0.02), line
    assert shown[1] == pytest.approx(measured, rel=0.001, abs=0.06), line


def check_served(title: str, clients: Clients, measured: tuple[float, float, float]) -> None:
    clients.run(lambda done: None)
    found = metrics.figures(clients.records, {})
    values = (*(found["latency_ms"][name]["p50"] for name in ("ttft", "tpot")), found["output_tokens_per_second"])
    for name, value, known in zip(LIMITS, values, measured, strict=True):
        check(title, value, known, name)


def offline_rate(model: str, config: Config, gpu: str, workload: Any, **constants: float) -> tuple[float, int]:
    """Output tokens/s of a workload without a server in the way, and the number of pages."""
    sessions = traffic.from_workload(msgspec.convert(workload, WorkloadSpec))
    alone = msgspec.structs.replace(read_gpu(gpu), request_seconds=0.0, event_seconds=0.0, **constants)
    replica = Replica(read_spec(MODELS / model), config, alone)
    Clients([replica], sessions).run(lambda done: None)
    tokens = sum(turn.output_length for turn in traffic.all_turns(sessions))
    return tokens / replica.executor.now, replica.executor.num_pages


@pytest.mark.parametrize("name", OFFLINE)
def test_throughput_of_each_offline_record_within_a_tenth(name: str) -> None:
    known = record(name)
    match = re.match(r"(Qwen3-[0-9.]+B(?:-A3B)?)(?:-tp(\d))?-(?:\dx)?(H\d+)", name)
    assert match is not None
    model, tp, gpu = match.groups()
    notes = dict(note.split(" = ") for note in known["config"] if " = " in note)
    config = Config(
        tp=int(tp or 1),
        max_prefill_length=int(notes["max_prefill_length"].split(":")[0]),
        all_reduce="nccl" if name.endswith("nccl") else "auto",
        overlap=not name.endswith("no-overlap"),
        quantization=notes.get("quantization"),
        kv_cache_dtype=notes.get("kv_cache_dtype", "auto"),
    )
    rate, pages = offline_rate(model, config, gpu, known["workload"])
    assert pages == pytest.approx(int(notes["num_pages"].split(":")[0]), rel=0.06)
    check(f"`{name}.json`", rate, known["figures"]["output_tokens_per_second"])
    if name in LATER:
        check("the same later, without a record", rate, LATER[name])


@pytest.mark.parametrize(("name", "group", "label"), ABLATIONS)
def test_throughput_of_chunks_and_of_steps_without_graphs(name: str, group: str, label: str) -> None:
    """Long prompts in chunks, and steps without CUDA graphs; in the older record only decode steps had any."""
    known = record(name)
    (found,) = (m for m in known["measurements"] if (m["variant"]["group"], m["variant"]["label"]) == (group, label))
    pieces: dict[str, Any] = {} if name.endswith("chunks") else {"piecewise_cuda_graph_max_tokens": 0}
    config, workload = Config(**found["variant"]["changes"], **pieces), known["scenarios"][found["variant"]["scenario"]]
    rate, _ = offline_rate("Qwen3-0.6B", config, "h200", workload, piece_seconds=3e-4)  # graphs ended at attention then
    check(f"`{name}.json`, {group} {label}", rate, found["tokens_per_second"])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_server_with_256_requests_at_once(seed: int) -> None:
    known = record("Qwen3-0.6B-H200-online")["runs"][seed]
    replica = Replica(read_spec(MODELS / "Qwen3-0.6B"), Config(max_prefill_length=16384), read_gpu("h200"))
    clients = Clients([replica], traffic.from_workload(WorkloadSpec(seed=seed)), concurrency=256)
    measured = *(known["latency_ms"][name]["p50"] for name in ("ttft", "tpot")), known["output_tokens_per_second"]
    check_served(f"`Qwen3-0.6B-H200-online.json`, seed {seed}", clients, measured)


@pytest.mark.parametrize(("scale", "chunk"), AZURE)
def test_a_server_under_the_azure_trace(scale: float, chunk: int) -> None:
    """The first 1,000 requests of the trace, `AzureLLMInferenceTrace_conv.csv` of the Azure dataset."""
    if not (path := os.environ.get("MINISGL_AZURE_TRACE")):
        pytest.skip("MINISGL_AZURE_TRACE does not name the Azure trace of 2023 (docs/simulator.md)")
    sessions = traffic.from_trace(traffic.read_trace(Path(path), 1000), scale, None, 1024)
    config = Config(tp=4, cache="naive", max_prefill_length=chunk)
    clients = Clients([Replica(read_spec(MODELS / "Qwen3-32B"), config, read_gpu("h200"))], sessions)
    check_served(f"Azure, gaps × {scale}, chunk {chunk:,}", clients, AZURE[scale, chunk])
