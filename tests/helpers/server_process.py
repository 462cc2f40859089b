"""The server as a process of its own, with the stub engine as another."""

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from helpers.processes import children, command_line, environment, wait_for
from helpers.serving import CHAT_TEMPLATE
from helpers.tiny_tokenizers import write_tokenizer

STUB = [sys.executable, "-m", "helpers.stub_engine"]
MAIN = """
import json, sys
from minisgl.config import make_config
from minisgl.errors import MinisglError
from minisgl.server.launch import serve
flags, *command = sys.argv[1:]
try:
    serve(make_config(**json.loads(flags)), command)
except MinisglError as error:
    sys.exit(f"error: {error.message}")
"""


@contextmanager
def server(
    folder: Path, tmp: Path, mode: str = "", environ: Mapping[str, str] = {}, template: str = CHAT_TEMPLATE, **conf: Any
) -> Iterator[tuple[Popen[str], str]]:
    """A server that is ready, and its URL; `conf` are fields of Config."""
    write_tokenizer(folder, template=template)
    tmp.mkdir()
    env = environment(STUB_MODE=mode, TMPDIR=str(tmp), **environ)
    command = [sys.executable, "-c", MAIN, json.dumps({"model": str(folder), "port": 0, **conf}), *STUB]
    process = Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=env, cwd=folder)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while lines[-1] and "-d '" not in lines[-1]:
            lines.append(process.stdout.readline())
        assert "is ready after" in "".join(lines[:2]), (lines, process.stderr)
        url = lines[1].rpartition(" on ")[2].strip().removesuffix("/v1")
        assert lines[3].strip() == "stub = on: it echoes"
        assert any(line.startswith(f"curl {url}/v1/chat/completions") for line in lines)
        assert f"chat in a browser: {url}/\n" in lines
        yield process, url
    finally:
        process.kill()
        process.communicate()


def ask_for(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """The status of a short answer, and its choices or its error; of a chat's stream the text and how it ended."""
    answer = httpx.post(f"{url}/v1/{path}", json={"max_tokens": 4, **body}, timeout=30)
    if answer.headers["content-type"].startswith("text/event-stream"):
        choices = [json.loads(line[6:])["choices"][0] for line in answer.text.split("\n\n")[:-2]]
        # How many tokens an event has depends on what else the machine does.
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        return answer.status_code, (text, choices[-1]["finish_reason"])
    return answer.status_code, answer.json().get("choices", answer.json().get("error"))


def ask(url: str, max_tokens: int, stream: bool = False) -> tuple[int, str]:
    """Status of an answer, on a connection of its own, and its finish reason or error code; 0 and "closed" for none.

    A stream says them in its last events.
    """
    body = {"prompt": "hello there", "max_tokens": max_tokens, "stream": stream}
    try:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    except (httpx.NetworkError, httpx.ProtocolError):  # a timeout is a failure of the test
        return 0, "closed"
    streamed = stream and answer.status_code == 200
    value = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: ")) if streamed else answer.json()
    return answer.status_code, value["error"]["code"] if "error" in value else value["choices"][0]["finish_reason"]


def running(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["running"])


def load(url: str, count: int, max_tokens: int) -> list[Future[tuple[int, str]]]:
    """Requests on threads of their own, every other one streamed, all in the engine when this returns."""
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(ask, url, max_tokens, stream=bool(i % 2)) for i in range(count)]
    pool.shutdown(wait=False)
    wait_for(lambda: running(url) == count)
    return futures


def metrics(url: str) -> dict[str, float]:
    return read_metrics(httpx.get(f"{url}/metrics").text)


def read_metrics(page: str) -> dict[str, float]:
    """Every sample, with its labels but the model's in the name."""
    found = {}
    for family in text_string_to_metric_families(page):
        assert family.documentation, family.name
        for sample in family.samples:
            if sample.name.startswith("minisgl:") and "http" not in sample.name:
                assert "model_name" in sample.labels
            rest = [value for key, value in sorted(sample.labels.items()) if key != "model_name"]
            found[".".join([sample.name.removeprefix("minisgl:"), *rest])] = sample.value
    return found


def api_processes(pid: int) -> list[int]:
    return [child for child in children(pid) if b"minisgl.server.api_process" in command_line(child)]


def engine_of(pid: int) -> int:
    (engine,) = set(children(pid)) - set(api_processes(pid))
    return engine
