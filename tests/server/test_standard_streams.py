"""A server serves whether anybody reads what it prints or not, ends with its terminal, and leaves no folder behind."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.processes import BOUND, children, environment, free_port, wait_until_gone
from helpers.server_process import MAIN, STUB, server
from helpers.serving import CHAT_TEMPLATE
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.server.launch import handle_signals
from minisgl.system import PrivateFolder, flush_standard_streams, open_standard_streams, print_text


def answers(port: int) -> bool:
    try:
        body = {"prompt": "hello", "max_tokens": 2}
        return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def serving(
    folder: Path, shell: str = "", before: str = "", workers: int = 1, unread: Sequence[str] = (), **options: Any
) -> Iterator[tuple[Any, int]]:
    """A server that answers, and its port; `shell` are redirections, `before` is Python that runs first, and nobody
    reads from the pipes that the `unread` streams are.
    """
    write_tokenizer(folder, template=CHAT_TEMPLATE)
    port = free_port()
    flags = json.dumps({"model": str(folder), "port": port, "drain_timeout": 5, "api_workers": workers})
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", before + MAIN, flags, *STUB]
    reader, writer = os.pipe()
    os.close(reader)
    options |= dict.fromkeys(unread, writer)
    process = subprocess.Popen(command, env=environment(), cwd=folder, **options)
    os.close(writer)
    try:
        deadline = time.monotonic() + 60
        while not answers(port) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, f"ended with {process.returncode}"
        yield process, port
    finally:
        process.kill()
        process.wait()


REDIRECTIONS = (
    ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "<&- >/dev/full 2>&1", ">/dev/null 2>&1 </dev/null",
)  # fmt: skip
STREAMS: list[dict[str, Any]] = [
    *({"shell": redirection} for redirection in REDIRECTIONS),
    {"shell": "<&- >&- 2>&-", "workers": 2},
    *({"unread": streams} for streams in (["stdout"], ["stderr"], ["stdout", "stderr"])),
    *({"before": f"import sys; {names} = None\n"} for names in ("sys.stderr", "sys.stdout", "sys.stderr = sys.stdout")),
]


@pytest.mark.parametrize("streams", STREAMS, ids=str)
def test_a_server_serves_whatever_its_standard_streams_are(tmp_path: Path, streams: dict[str, Any]) -> None:
    with serving(tmp_path, **streams) as (process, port):
        assert answers(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND) == 0


def test_a_server_whose_terminal_is_closed_drains_and_ends(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with serving(tmp_path, before=take, start_new_session=True, **streams) as (process, port):
        os.close(terminal)
        assert answers(port)
        os.close(controller)
        assert process.wait(BOUND) == 0


async def test_signals_are_heard_when_nobody_reads_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    shutdown = handle_signals()
    for event in (shutdown.stop, shutdown.force):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(event.wait(), 10)
    flush_standard_streams()
    sys.stderr.close()


async def test_a_closed_terminal_drains_and_never_cuts_short() -> None:
    shutdown = handle_signals()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(shutdown.stop.wait(), 10)
        await asyncio.sleep(0.05)
    assert not shutdown.force.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(shutdown.force.wait(), 10)


async def test_under_nohup_a_closed_terminal_is_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        shutdown = handle_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        assert not shutdown.stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_closed_streams_are_replaced_and_others_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sys.stdout
    open_standard_streams()
    assert sys.stdout is kept
    monkeypatch.setattr(sys, "stderr", None)
    print_text("to nobody")
    open_standard_streams()
    assert sys.stderr.fileno() == 2


def test_the_next_start_removes_what_a_killed_server_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp = tmp_path / "tmp"
    with server(tmp_path / "model", tmp) as (process, _):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp))
        (living,) = tmp.iterdir()
        with PrivateFolder() as own:
            assert {str(path) for path in tmp.iterdir()} == {str(living), own}, "it lives"
        engines = children(process.pid)
        process.kill()
        process.wait()
        wait_until_gone(engines)
    assert list(tmp.iterdir()) == [living]
    (tmp / "minisgl-of-another-program").mkdir()
    os.mkfifo(tmp / "minisgl-of-another-program" / "x")
    (tmp / "minisgl-file").touch()
    with PrivateFolder() as own:
        assert Path(own).stat().st_mode & 0o777 == 0o700
        assert {path.name for path in tmp.iterdir()} == {Path(own).name, "minisgl-of-another-program", "minisgl-file"}
    assert not Path(own).exists()


def test_a_folder_that_another_user_made_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "minisgl-x").mkdir()
    os.mkfifo(tmp_path / "minisgl-x" / "lock")  # opening it would wait for ever
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with PrivateFolder():
        assert (tmp_path / "minisgl-x" / "lock").exists()
