"""The server as a process of its own, with an engine that is one too."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from helpers.processes import BOUND, children, wait_until_gone
from helpers.server_process import STUB, server
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.config import Config, Machine, resolve
from minisgl.errors import ConfigError, EngineDeadError, ModelError
from minisgl.server import launch
from minisgl.server.ipc import EngineSetup
from minisgl.server.launch import ENGINE_COMMAND, listen_socket, serve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_server_and_engine_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with server(tmp_path / "model", tmp_path / "tmp") as (process, url):
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 4
        (engine,) = children(process.pid)
        assert os.getsid(engine) == engine != os.getsid(process.pid)
        assert next((tmp_path / "tmp").iterdir()).stat().st_mode & 0o777 == 0o700
        process.send_signal(number)
        assert process.wait(BOUND) == 0
        wait_until_gone([engine])
        assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_engine_cannot_start_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=os.pathsep)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = Config(model=str(write_tokenizer(tmp_path / "model")), port=0, api_workers=workers)
    for mode, error, text in (
        ("fail", ModelError, "no such model, says the stub"),
        ("exit", EngineDeadError, "ended with exit status 3 before it was ready"),
    ):
        with pytest.raises(error, match=text):
            serve(config, ["env", f"STUB_MODE={mode}", *STUB])
        assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left"


def test_an_engine_that_cannot_start_ends_by_itself(tmp_path: Path) -> None:
    setup = msgspec.json.encode(EngineSetup(Config(model=str(tmp_path / "none")), str(tmp_path))) + b"\n"
    # Its stdin stays open, as the parent leaves it until it has read what was wrong.
    with subprocess.Popen(ENGINE_COMMAND, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as engine:
        assert engine.stdin is not None
        assert engine.stderr is not None
        engine.stdin.write(setup)
        try:
            assert engine.wait(60) == 1
        finally:
            engine.kill()
        assert engine.stderr.read() == b""


def test_the_engine_gets_no_key_and_takes_the_priorities_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    setups: list[EngineSetup] = []

    async def start(command: Any, setup: EngineSetup) -> None:
        setups.append(setup)
        raise OSError("started enough")

    monkeypatch.setattr(launch, "start_process", start)
    with pytest.raises(OSError, match="started enough"):
        serve(Config(port=0, api_key=("secret", "other"), client_priorities=("0:9", "2=-5:9")), [])
    assert b"secret" not in msgspec.json.encode(setups[0])
    assert resolve(setups[0].config, Machine()).config.client_priorities == ("0:9", "2=-5:9")


def test_waiting_for_a_slow_engine_is_told_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "LOADING_SECONDS", 0.1)
    sleeper = [sys.executable, "-c", "import sys, time; time.sleep(1); sys.exit(4)"]
    with pytest.raises(EngineDeadError, match="ended with exit status 4 before it was ready"):
        launch.serve(Config(port=0), sleeper)
    assert capsys.readouterr().err.count("still loading after") >= 3


def test_a_port_in_use_is_an_error_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            serve(Config(port=port), ["/nothing/that/could/start"])
    with pytest.raises(ConfigError, match="--host no-such-host"):
        listen_socket("no-such-host.invalid", 1919)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, minisgl.server.api_process, minisgl.server.launch\n"
        "print(sorted({'torch', 'transformers', 'minisgl.models', 'minisgl.ops'} & set(sys.modules)))"
    )
    result: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
