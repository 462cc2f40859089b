"""What `--record` wrote comes back: the same lengths, prefixes, sampling parameters and priorities."""

import asyncio
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest

from helpers.serving import serving
from helpers.simulation import run, simulated_engine
from minisgl.config import Config
from minisgl.core.model_config import read_spec
from minisgl.core.types import Request, SamplingParams
from minisgl.errors import ConfigError
from minisgl.trace import BLOCK, TrafficRecorder
from minisgl_bench import traffic
from minisgl_bench.client import LoadClient, parse_target
from minisgl_bench.command import main
from minisgl_bench.cost_model import read_gpu
from minisgl_bench.simulation import Clients, Replica

MODEL = Path(__file__).parents[2] / "benchmark/models/Qwen3-0.6B"
PREFIX = list(range(8, 8 + BLOCK))
# What a request asks for, and its priority; the last ends by a stop token or by its length.
ASKED: list[tuple[dict[str, Any], int]] = [
    ({"temperature": 0.0}, 0),
    ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 5}, 0),
    ({"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}, 3),
    ({"logprobs": 2, "skip_special_tokens": False}, -1),
    ({"stop_token_ids": tuple(range(0, 50, 2)), "min_tokens": 2, "truncate_prompt_tokens": 90}, 1),
]
LENGTH = ("max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "truncate_prompt_tokens")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    engine = simulated_engine(num_pages=64)
    engine.observers.append(TrafficRecorder(str(tmp_path / "traffic.jsonl")))
    requests = [
        Request.make(str(i), [*PREFIX, *range(30 + i, 36 + i)], SamplingParams(max_tokens=4 + i, **params), priority)
        for i, (params, priority) in enumerate(ASKED)
    ]
    run(engine, requests)
    engine.close()
    return tmp_path / "traffic.jsonl"


def check(requests: Sequence[Request], recording: Path, without: Sequence[str] = ()) -> None:
    """These are the requests that were recorded, each as often as it was."""
    lines = [json.loads(line) for line in recording.read_text().splitlines()]
    assert len(requests) == len(lines) == len(ASKED)
    for number, (params, priority) in enumerate(ASKED):
        (line,) = [line for line in lines if line["chat_id"] == number]
        (found,) = [r for r in requests if r.params.max_tokens == line["output_length"] and r.priority == priority]
        assert len(found.prompt) == BLOCK + 6
        assert found.params.ignore_eos
        expected = msgspec.structs.asdict(SamplingParams(**params))
        for name, value in msgspec.structs.asdict(found.params).items():
            if name not in (*LENGTH, *without) and not (name == "seed" and value is not None and "seed" not in params):
                assert value == expected[name], name
        assert (found.params.min_tokens, found.params.stop_token_ids) == (0, ())
        assert found.params.truncate_prompt_tokens is None
    assert len({r.prompt[:BLOCK].tobytes() for r in requests}) == 1
    assert len({r.prompt.tobytes() for r in requests}) == len(ASKED)


def test_a_simulation_gets_what_was_recorded(recording: Path, tmp_path: Path) -> None:
    sessions = traffic.from_trace(traffic.read_trace(recording, 10), 1.0, None, None)
    replica, seen = Replica(read_spec(MODEL), Config(), read_gpu("h200")), Mock()
    replica.engine.observers.append(seen)
    clients = Clients([replica], sessions)
    clients.run(lambda done: None)
    check([call.args[0] for call in seen.add.call_args_list], recording, without=("logprobs",))
    assert all(record.completion_tokens == record.expected_output for record in clients.records)
    words = ["--model", str(MODEL), "--trace", str(recording), "--json", str(tmp_path / "report.json")]
    assert main(["simulate", *words, "--trace-steps", str(tmp_path / "steps.json")]) == 0
    names = [event["name"] for event in json.loads((tmp_path / "steps.json").read_text())]
    assert sum(name == "end: length" for name in names) == len(ASKED)
    assert sum(name.startswith("step ") for name in names) > 3  # the simulated device


async def test_a_server_gets_what_was_recorded(recording: Path, tmp_path: Path) -> None:
    def bench(port: int) -> int:
        line = f"online --url http://127.0.0.1:{port} --trace {recording} --tokens 8:200 --warmup 0 --salt 1"
        return main([*line.split(), "--json", str(tmp_path / "report.json")])

    async with serving(tmp_path, client_priorities=("-5:5",)) as server:
        assert await asyncio.to_thread(bench, server.port) == 0
        check(server.engine.seen[1:], recording)  # behind the probe
    (found,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert (found["wrong_input_length"], found["wrong_output_length"], found["failed"]) == (0, 0, {})


def test_a_chat_asks_for_log_probabilities_in_its_way() -> None:
    client = LoadClient(parse_target("127.0.0.1:9", None), "m", traffic.IdPrompts(0, 9), Namespace(endpoint="chat"))
    turn = traffic.Turn((), 4, SamplingParams(logprobs=3, temperature=0.5))
    assert client.sampling(turn) == {"logprobs": True, "top_logprobs": 3, "temperature": 0.5}


@pytest.mark.parametrize("wrong", ['"sampling": {"top_p": 2}', '"sampling": 3', '"priority": 4294967296'])
def test_a_wrong_recording_is_told_with_its_line(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    good = '{"chat_id": 0, "timestamp": 0, "input_length": 3, "output_length": 1'
    path.write_text(f"{good}}}\n{good}, {wrong}}}\n")
    with pytest.raises(ConfigError, match=f"t:2: .*{wrong.split(chr(34))[-2 if '{' in wrong else 1]}"):
        traffic.read_trace(path, 10)


def test_what_decides_on_tokens_is_not_replayed(tmp_path: Path) -> None:
    deciding = {"allowed_token_ids": [1], "bad_words": ["a"], "bad_word_ids": [[2]], "stop": ["b"], "top_k": 3}
    row = {"chat_id": 0, "timestamp": 0, "input_length": 3, "output_length": 1, "sampling": deciding}
    (tmp_path / "t").write_text(json.dumps(row))
    (found,) = traffic.read_trace(tmp_path / "t", 10).requests
    assert found.sampling == SamplingParams(ignore_eos=True, top_k=3)
