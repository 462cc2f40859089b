"""`minisgl bench online` from its command line, against our server and against one that fails."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from helpers.raw_server import DONE, chunked, event, head, json_answer, raw_server, text_event, usage_event
from minisgl.errors import EngineDeadError
from minisgl.system import install_command
from minisgl_bench import online
from minisgl_bench.command import main
from minisgl_bench.online import OwnServer, own_server
from minisgl_bench.traffic import WORDS

VOCABULARY = 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
    "eos_token_id": 1,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
SERVER_FLAGS = ("--dummy-weight", "--device", "cpu", "--num-pages", "1024", "--max-running-requests", "32")


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_words(folder: Path) -> None:
    names = ["<unk>", "</s>", "user", "assistant", "system", ":", *WORDS[3:]]
    names += [f"x{number}" for number in range(VOCABULARY - len(names))]
    backend = tokenizers.Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_trace(path: Path) -> Path:
    rows: list[str] = []
    history = {chat: [0, 1, 2] for chat in range(5)}
    own = itertools.count(100)
    for turn, chat in itertools.product(range(4), range(5)):
        history[chat] += itertools.islice(own, 2)
        length = 16 * len(history[chat]) - (chat + turn) % 5
        row = {"chat_id": 5 * turn + chat, "timestamp": 10 + 0.05 * len(rows), "input_length": length}
        rows.append(json.dumps({**row, "output_length": 3 + chat, "hash_ids": history[chat]}) + "\n")
    path.write_text("".join(rows))
    return path


def bench(*words: str | Path) -> int:
    return main(["online", *map(str, words)])


def report(path: Path) -> Any:
    return json.loads(path.read_text())


def test_one_command_serves_a_bare_config_and_replays_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, trace = write_model(tmp_path / "model"), write_trace(tmp_path / "trace.jsonl")
    path, measured = tmp_path / "report.json", online.measure_one
    dues: list[list[float]] = []

    async def measure_one(*arguments: Any) -> Any:
        records = await measured(*arguments)
        dues.append([record.due - records[0].due for record in records])
        return records

    monkeypatch.setattr(online, "measure_one", measure_one)
    status = bench(
        "--serve", "--model", model, *SERVER_FLAGS, "--trace", trace, "--scale", "0.5,0.1", "--tokens", "256:512",
        "--slo", "ttft=60s,tpot=60s", "--json", path, "--api-key", "sk-hidden",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    found = report(path)
    assert "sk-hidden" not in path.read_text() + printed
    assert [run["label"] for run in found["runs"]] == ["scale 0.5", "scale 0.1"]
    for run in found["runs"]:
        assert (run["requests"], run["failed"], run["wrong_input_length"], run["wrong_output_length"]) == (20, {}, 0, 0)
        assert run["output_tokens"] == 4 * (3 + 4 + 5 + 6 + 7)
        assert run["expected_hit_rate"] > 0.5
        assert run["reported_hit_rate"] == pytest.approx(run["expected_hit_rate"], abs=0.01)
        assert run["within_slo"] == 1
        assert 0 < run["latency_ms"]["ttft"]["p50"] <= run["latency_ms"]["e2e"]["p50"]
        assert {row["name"] for row in run["server_cpu"]} >= {"minisgl", "minisgl.server.engine_process"}
    for found_dues, gap in zip(dues, (0.025, 0.005), strict=True):  # 50 ms, times the scale
        assert found_dues == pytest.approx([gap * i for i in range(20)])
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "prefix cache: " in printed
    assert "p50 / p90 / p99 in ms" in printed


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_model(tmp_path_factory.mktemp("words") / "model")
    write_words(model)
    with own_server(["--model", str(model), *SERVER_FLAGS], None) as served:
        yield served.url


LENGTHS = ("--input-len", "20:60", "--output-len", "2:6", "--warmup", "2")


@pytest.mark.parametrize("endpoint", ["ids", "text", "chat"])
def test_prompts_have_exact_lengths_on_every_endpoint(endpoint: str, url: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ("--endpoint", endpoint, "--tokens", "2:512", "--requests", "12", "--json", path, *LENGTHS)
    assert bench("--url", f"{url}/v1", "--rate", "100", "--burstiness", "0.5", *words) == 0
    (run,) = report(path)["runs"]
    assert (run["requests"], run["wrong_input_length"], run["wrong_output_length"]) == (12, 0, 0)
    assert run["server_cpu"][0]["pid"] > 0  # found by its port


def test_concurrency_is_kept_for_each_of_several_values_and_seeds(url: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ("--tokens", "2:512", "--requests", "6", "--json", path, *LENGTHS)
    assert bench("--url", url, "--concurrency", "2,6", "--seeds", "0,1", *words) == 0
    runs = report(path)["runs"]
    labels = [f"concurrency {n}, seed {seed}" for n in (2, 6) for seed in (0, 1)]
    assert [run["label"] for run in runs] == labels
    assert runs[0]["output_tokens"] == runs[2]["output_tokens"]  # the same seed, the same lengths
    assert [run["reported_hit_rate"] for run in runs] == [0, 0, 0, 0]  # and other tokens


@pytest.mark.parametrize("endpoint", ["ids", "chat"])
def test_chats_find_what_was_said_before_in_the_cache(endpoint: str, url: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    words = ("--chats", "3", "--turns", "3", "--system-len", "64", "--think", "0.01", "--endpoint", endpoint)
    assert bench("--url", url, "--concurrency", "1", *words, "--tokens", "2:512", "--json", path, *LENGTHS) == 0
    (run,) = report(path)["runs"]
    assert (run["requests"], run["failed"]) == (9, {})
    assert run["reported_hit_rate"] > 0.5
    if endpoint == "ids":
        assert run["reported_hit_rate"] == pytest.approx(run["expected_hit_rate"], abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url", "http://127.0.0.1:9", "--rate", "1"), "no answer from 127.0.0.1:9/v1/models"),
        (("--rate", "1", "--model", "other"), "--model other: the server lists "),
        (("--rate", "1", *LENGTHS), "does not answer a first request: HTTP 400: token ids must be between 0 and"),
        (("--rate", "1", "--requests", "2", "--input-len", "2000"), "2 of 2 requests are longer than the 1024 tokens"),
        (("--rate", "1", "--json", "/nowhere/x.json"), "--json /nowhere/x.json: not a file that can be written"),
        (("--trace", "/nowhere/x"), "/nowhere/x: No such file"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(
    words: Sequence[str], message: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--url", url, *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_missing_package_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("minisgl_bench.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httptools", None)
    assert bench("--rate", "1") == 1
    command = install_command("httptools", "psutil")
    assert capsys.readouterr().err == f"error: bench online needs httptools and psutil: {command}\n"


def test_a_wrong_trace_is_told_before_a_server_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--serve", "--model", tmp_path / "absent", "--trace", tmp_path / "trace") == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {tmp_path / 'trace'}: No such file or directory\n"
    assert "starting" not in printed.out


def test_a_server_of_our_own_that_dies_leaves_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"

    @contextlib.contextmanager
    def dying(flags: Sequence[str], key: str | None) -> Iterator[OwnServer]:
        with own_server(flags, key) as served:
            timer = threading.Timer(2.0, os.kill, (served.pid, signal.SIGKILL))
            timer.start()
            yield served

    monkeypatch.setattr("minisgl_bench.online.own_server", dying)
    words = ("--requests", "3", "--input-len", "5", "--output-len", "1000", "--tokens", "2:512", "--json", path)
    model = write_model(tmp_path / "model")
    assert bench("--serve", "--model", model, *SERVER_FLAGS, "--concurrency", "1", "--warmup", "0", *words) == 1
    assert "the server ended with status -9" in capsys.readouterr().err
    (run,) = report(path)["runs"]
    assert sum(run["failed"].values()) > 0


def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    flags = ["--model", str(tmp_path), "--dummy-weight"]
    with pytest.raises(EngineDeadError, match=r"ended with status 1: (.|\n)*config.json"), own_server(flags, None):
        raise AssertionError


def test_requests_that_fail_are_counted_by_kind_and_the_status_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number, path = itertools.count(), tmp_path / "report.json"
    refused = {"error": {"message": "no room"}}
    sse = head("200 OK", "Transfer-Encoding: chunked")

    def script(path: str, body: dict[str, Any]) -> Sequence[bytes]:
        if path == "/v1/models":
            return [json_answer({"data": [{"id": "stub"}]})]
        ways = {
            3: [json_answer(refused, "503 Service Unavailable")],
            6: [sse, chunked(text_event("a") + event(refused) + DONE)],
            9: [sse, chunked(text_event("a"), end=False)],
        }
        counts = usage_event(len(body["prompt"]), body["max_tokens"], None)
        good = [sse, *(chunked(text_event("a"), end=False) for _ in range(3)), chunked(counts + DONE)]
        return ways.get(next(number), good)

    async def measure() -> int:
        words = ("--requests", "12", "--input-len", "5", "--output-len", "8", "--warmup", "0", "--json", path)
        async with raw_server(script) as url:
            return await asyncio.to_thread(bench, "--url", url, "--concurrency", "1", *words)

    assert asyncio.run(measure()) == 1
    (run,) = report(path)["runs"]
    assert run["failed"] == {"HTTP 503": 1, "error in the stream": 1, "cut off": 1}
    assert (run["input_tokens"], run["output_tokens"], run["reported_hit_rate"]) == (9 * 5, 9 * 8, None)
    assert run["tokens_per_event"] == pytest.approx(8 / 3)
    printed = capsys.readouterr().out
    for text in ("9 of 12 requests in ", "failed: 1 × HTTP 503: no room", "not reported by the server"):
        assert text in printed
