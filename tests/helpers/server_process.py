"""The server as a process of its own, with the stub engine as another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from helpers.serving import CHAT_TEMPLATE
from helpers.tiny_tokenizers import write_tokenizer

STUB = [sys.executable, "-m", "helpers.stub_engine"]
MAIN = """
import json, sys
from minisgl.config import Config, from_environment
from minisgl.errors import MinisglError
from minisgl.server.launch import serve
flags, *command = sys.argv[1:]
flags = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(flags).items()}
try:
    serve(from_environment(Config()).replace(**flags), command)
except MinisglError as error:
    sys.exit(f"error: {error.message}")
"""


@contextmanager
def server(
    folder: Path,
    temporary: Path,
    mode: str = "",
    environ: dict[str, str] | None = None,
    template: str = CHAT_TEMPLATE,
    **flags: Any,
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, and its URL; `flags` are fields of Config."""
    write_tokenizer(folder, template=template)
    temporary.mkdir()
    here = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "STUB_MODE": mode, "TMPDIR": str(temporary), "PYTHONPATH": here, **(environ or {})}
    command = [sys.executable, "-c", MAIN, json.dumps({"model": str(folder), "port": 0, **flags}), *STUB]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while lines[-1] and "-d '" not in lines[-1]:
            lines.append(process.stdout.readline())
        assert "is ready after" in "".join(lines[:2]), (lines, process.stderr)
        url = lines[1].rpartition(" on ")[2].strip().removesuffix("/v1")
        assert lines[3].strip() == "stub = on: it echoes"
        assert any(line.startswith(f"curl {url}/v1/chat/completions") for line in lines)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def gone(pid: int, within: float) -> bool:
    """Whether a process ends in time (s)."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def ask_for(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """The status of a short answer, and its choices, those of every event, or its error."""
    answer = httpx.post(f"{url}/v1/{path}", json={"max_tokens": 4, **body}, timeout=30)
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        return answer.status_code, [event["choices"] for event in events]
    value = answer.json()
    return answer.status_code, value.get("choices", value.get("error"))
