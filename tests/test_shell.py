"""The shell in a pseudo-terminal, as a person uses it."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console

from minisgl.chat import Shell, open_history
from minisgl.config import cache_folder
from minisgl.core.types import SamplingParams

PROMPT = ">(\x08| )"  # the terminal may be told to step over the space
SPEED = re.compile(r"\d+ tokens, ([\d.]+ tokens/s, )?first after [\d.]+ s")


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[pexpect.spawn[str]]:
    """A shell that is ready, with a history of its own and the converted model of the user."""
    models = Path(cache_folder())
    (tmp_path / "minisgl").mkdir()
    for entry in models.iterdir() if models.exists() else ():
        if entry.is_dir():
            (tmp_path / "minisgl" / entry.name).symlink_to(entry)
    own = {"MINISGL_CACHE": str(tmp_path / "minisgl"), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = f"{sys.executable} -m minisgl --shell --max-seq-len-override 600"
    child = pexpect.spawn(command, env={**os.environ, **own}, encoding="utf-8", timeout=60, dimensions=(40, 200))
    child.expect("/reset forgets")
    child.expect(PROMPT)
    yield child
    child.close(force=True)


def test_a_session_of_chat(shell: pexpect.spawn[str]) -> None:
    def say(line: str, shown: re.Pattern[str] | str) -> None:
        shell.sendline(line)
        shell.expect(shown)
        shell.expect(PROMPT)

    say("What is the capital of France? Answer in one word.", SPEED)
    words = r"([A-Za-z]+[,.]?\s+){12}"  # more than the question has, which is shown again: the answer has begun
    shell.sendline("Write a very long story about the sea.")
    while shell.expect([words, SPEED]) == 1:  # it was a short one, as nothing fixes the seed
        shell.expect(PROMPT)
        shell.sendline("Write a very long story about the sea.")
    shell.sendintr()
    shell.expect(r"\(stopped\)")
    shell.expect(PROMPT)
    say("/reset", "starts anew")
    say("/nonsense", "unknown command /nonsense")
    shell.send("\x1b[A\x1b[A\x1b[A\x1b[A")  # arrow up, to the first question
    shell.expect("capital of France")
    shell.sendline("")
    shell.expect(SPEED)

    shell.sendline("word " * 700)
    shell.expect("maximum context length")

    shell.sendline("/exit")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0


class InterruptingFile(io.StringIO):
    """A terminal at which Ctrl-C arrives while the speed of an answer is printed."""

    def write(self, text: str) -> int:
        if "tokens" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_ctrl_c_at_any_moment_of_an_answer_keeps_the_session() -> None:
    conversations: list[list[Any]] = []

    def encode_chat(messages: list[Any]) -> list[int]:
        conversations.append(list(messages))
        os.kill(os.getpid(), signal.SIGINT)
        return [1]

    def stream(prompt: list[int], params: SamplingParams) -> Iterator[Any]:
        yield SimpleNamespace(text="Yes", token_ids=[2])
        raise AssertionError("the answer went on after Ctrl-C")

    text, lines = SimpleNamespace(encode_chat=encode_chat), iter(["Is it?", "Really?", "/exit"])
    llm: Any = SimpleNamespace(model=SimpleNamespace(name="stub"), text=text, stream=stream)
    Shell(llm, lambda: next(lines), Console(file=InterruptingFile())).run()
    said = [(message["role"], message["content"]) for message in conversations[1]]
    assert said == [("user", "Is it?"), ("assistant", "Yes"), ("user", "Really?")]


def test_the_history_is_kept_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_CACHE", str(tmp_path / "new"))
    assert isinstance(open_history(), FileHistory)
    monkeypatch.setenv("MINISGL_CACHE", "/dev/null/none")
    assert isinstance(open_history(), InMemoryHistory)


def test_without_a_terminal_lines_come_from_standard_input() -> None:
    shell = f"{sys.executable} -m minisgl --shell --max-seq-len-override 200"
    command = f"""sh -c "printf 'What is the capital of France?\\n/exit\\n' | {shell}" """
    text, status = pexpect.run(command, withexitstatus=True, timeout=60, encoding="utf-8")
    assert SPEED.search(text)
    assert status == 0


def test_without_standard_input_there_is_nothing_to_answer() -> None:
    shell = f"exec {sys.executable} -m minisgl chat --max-seq-len-override 200 <&-"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
