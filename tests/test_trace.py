"""The trace of an engine's steps and the recording of its traffic, over a simulated device and the bundled model."""

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helpers.simulation import advance, calls_of_a_step, instant_engine, record_plans, request, run, simulated_engine
from minisgl.build import build_engine
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.types import Grammar, SamplingParams
from minisgl.errors import ConfigError
from minisgl.llm import LLM
from minisgl.server.debug import StepLog
from minisgl.trace import BLOCK, TraceWriter, TrafficRecorder
from minisgl_bench.traffic import read_trace

PREFIX = list(range(8, 28))
HOST, DEVICE, REQUESTS = 1, 2, 3


def busy_engine() -> Engine:
    """Requests that share a prefix and need more pages than there are, so that some are retracted."""
    return simulated_engine(num_pages=12, max_running_requests=4, max_prefill_length=12)


def traffic() -> list[Any]:
    return [request(f"r{index}", [*PREFIX, 30 + index], max_tokens=12, ignore_eos=True) for index in range(6)]


def check_format(events: list[dict[str, Any]]) -> None:
    """The Trace Event Format: what each phase must have, and that the spans of a track do not overlap."""
    tracks = defaultdict(list)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            case "i":
                assert event["s"] == "t"
            case "M":
                assert set(event["args"]) == {"name"}
            case "C":
                assert all(isinstance(value, int) for value in event["args"].values())
            case phase:
                pytest.fail(f"no such phase: {phase}")
        if event["pid"] == REQUESTS and event["ph"] != "M":
            assert (event["pid"], event["tid"]) in named
    for spans in tracks.values():
        assert all(end <= start + 0.01 for (_, end), (start, _) in pairwise(sorted(spans)))


def test_a_trace_has_every_row_of_every_step(tmp_path: Path) -> None:
    engine, trace = busy_engine(), TraceWriter(str(tmp_path / "trace.json"))
    engine.observers.append(trace)
    plans = record_plans(engine)
    run(engine, traffic())
    check_format(json.loads((tmp_path / "trace.json").read_text() + "]"))  # as after a crash
    engine.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    check_format(events)
    names = Counter(e["name"].split(" ")[0] for e in events if e["pid"] == HOST and e["ph"] == "X")
    assert names == dict.fromkeys(("plan", "launch", "wait", "commit"), len(plans))
    spans = [e for e in events if e["pid"] == REQUESTS and e["ph"] == "X"]
    for plan in plans:
        mine = Counter(e["name"].split(" ")[0] for e in spans if e["args"]["step"] == plan.step)
        assert (mine["decode"], mine["prompt"]) == (len(plan.decode_slots), len(plan.prefill_slots))
    instants = Counter(e["name"].split(",")[0] for e in events if e["ph"] == "i")
    assert instants["retracted"] == engine.scheduler.counts.retracted > 0
    assert instants["admitted"] == 6 + engine.scheduler.counts.retracted
    assert instants["end: length"] == 6
    assert "admitted, 20 tokens cached" in {e["name"] for e in events}


def test_every_end_is_in_a_trace_however_a_request_ended(tmp_path: Path) -> None:
    engine, trace = busy_engine(), TraceWriter(str(tmp_path / "trace.json"))
    engine.observers.append(trace)
    asked = [*traffic(), *(request(f"s{seed}", [9, seed], max_tokens=40, seed=seed) for seed in range(6))]
    for one in asked:
        engine.add(one)
    events = engine.step() + engine.step()
    engine.abort(["r1", "r5"])  # a running request, and a waiting one
    events += advance(engine)
    engine.add(request("last", [8], max_tokens=1))
    events += advance(engine)
    engine.close()
    shown = json.loads((tmp_path / "trace.json").read_text())
    check_format(shown)
    ends = sorted(e["name"].removeprefix("end: ") for e in shown if e["ph"] == "i" and e["name"].startswith("end: "))
    assert ends == sorted(event.finish for event in events if event.finish is not None)
    assert set(ends) == {"abort", "length", "stop"}


def test_a_trace_has_the_device_and_a_recording_no_word_and_no_token_of_a_request(tmp_path: Path) -> None:
    trace, recording = tmp_path / "trace.json", tmp_path / "traffic.jsonl"
    grammar = Grammar(kind="choice", source='["giraffe", "okapi"]')
    texts = {"stop": ("gazelle",), "stop_token_ids": (41414,), "logit_bias": {42424: 1.0}, "grammar": grammar}
    params = SamplingParams(temperature=0, max_tokens=3, top_k=5, **dict[str, Any](texts))
    with LLM(trace_steps=str(trace), record=str(recording)) as llm:
        (said,) = llm.generate(["The zebra crossing"], params, progress=False)
    events = json.loads(trace.read_text())
    check_format(events)
    first = next(e["name"] for e in events if e["pid"] == DEVICE and e["ph"] == "X")
    assert first.startswith("step 1: 0 decodes, ")
    text = recording.read_text().lower()
    row = json.loads(text)
    assert row["sampling"] == {"temperature": 0, "max_tokens": 3, "top_k": 5}
    assert (row["input_length"], row["output_length"]) == (len(said.prompt_token_ids), len(said.token_ids))
    words = ("zebra", "crossing", "gazelle", "giraffe", "okapi", said.text.strip(), "41414", "42424")
    assert [word for word in words if word in text] == []
    assert row.keys() - {"chat_id", "timestamp", "finish", "priority"} == {
        "input_length", "output_length", "hash_ids", "sampling",
    }  # fmt: skip


def test_a_recording_keeps_lengths_and_common_prefixes_and_no_tokens(tmp_path: Path) -> None:
    engine = busy_engine()
    engine.observers.append(TrafficRecorder(str(tmp_path / "traffic.jsonl")))
    shared = list(range(5, 5 + 2 * BLOCK))
    prompts = {"a": [*shared, 1, 2], "b": [*shared, 3], "c": [*shared[:-1], 4, 5]}
    run(engine, [request(name, prompt, max_tokens=4, ignore_eos=True) for name, prompt in prompts.items()])
    engine.abort(["a"])
    engine.close()
    trace = read_trace(tmp_path / "traffic.jsonl", limit=10)
    assert (trace.format, trace.block) == ("bailian", BLOCK)
    a, b, c = trace.requests
    assert [(r.input_length, r.output_length) for r in (a, b, c)] == [(34, 4), (33, 4), (33, 4)]
    assert a.hash_ids[:2] == b.hash_ids[:2]
    assert a.hash_ids[2] != b.hash_ids[2]
    assert (a.hash_ids[0], a.hash_ids[1] == c.hash_ids[1]) == (c.hash_ids[0], False)
    again = TrafficRecorder(str(tmp_path / "again.jsonl"))
    tokens: dict[str, Any] = {"allowed_token_ids": (5, 6), "bad_word_ids": ((7, 8),), "bad_words": ("quagga",)}
    again.add(request("a", prompts["a"], max_tokens=4, **tokens))
    assert again._live["a"]["sampling"] == {"temperature": 0.0, "max_tokens": 4}
    assert again._live["a"]["hash_ids"] != list(a.hash_ids)  # another key
    again.close()


@pytest.mark.parametrize("setting", ["trace_steps", "record"])
def test_a_file_that_cannot_be_made_is_an_error_before_the_model_loads(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')} .*No such file"):
        build_engine(Config(model=str(tmp_path / "no model")).replace(**{setting: str(tmp_path / "missing" / "file")}))


def test_a_full_disk_ends_the_files_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    engine = busy_engine()
    engine.observers.append(TraceWriter("/dev/full"))
    engine.observers.append(TrafficRecorder("/dev/full"))
    events = run(engine, traffic())
    engine.close()
    assert all(found[-1].finish == "length" for found in events.values())
    assert [record.getMessage() for record in caplog.records] == [
        "--trace-steps /dev/full is not written any more: No space left on device",
        "--record /dev/full is not written any more: No space left on device",
    ]


@pytest.mark.parametrize(("kind", "each_row"), [("endpoints", 0), ("trace", 2), ("recording", 3)])
def test_watching_a_step_takes_few_calls_a_row(kind: str, each_row: int, tmp_path: Path) -> None:
    more = []
    for rows in (16, 256):
        found = []
        for watched in ("nothing", kind):
            engine = instant_engine(20_000, 2048, Config(max_running_requests=rows, max_prefill_length=65536))
            if watched == "endpoints":
                engine.observers.append(StepLog())
            elif watched == "trace":
                engine.observers.append(TraceWriter(str(tmp_path / "trace.json")))
            elif watched == "recording":
                engine.observers.append(TrafficRecorder(str(tmp_path / "traffic.jsonl")))
            for number in range(rows):
                engine.add(request(f"chatcmpl-{number:024x}-0", [*range(100)], max_tokens=100, ignore_eos=True))
            advance(engine, 3)
            found.append(calls_of_a_step(engine))
            engine.close()
        more.append(found[1] - found[0])
    assert more[1] <= more[0] + 240 * each_row + 10
