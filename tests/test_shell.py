"""The shell in a pseudo-terminal, as a person uses it."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pexpect
import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console

from minisgl.chat import Shell, open_history
from minisgl.config import cache_folder
from minisgl.core.types import SamplingParams
from minisgl.llm import LLM

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
    shell.sendline("What is the capital of France? Answer in one word.")
    shell.expect(SPEED)
    shell.expect(PROMPT)

    shell.sendline("Write a very long story about the sea.")
    shell.expect(r"([A-Za-z]+[,.]?\s+){12}")  # more than the question has, which is shown again: the answer has begun
    shell.sendintr()
    shell.expect(r"\(stopped\)")
    shell.expect(PROMPT)

    shell.sendline("/reset")
    shell.expect("starts anew")
    shell.expect(PROMPT)
    shell.sendline("/nonsense")
    shell.expect("unknown command /nonsense")
    shell.expect(PROMPT)

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


class Interrupting:
    """A model at which Ctrl-C arrives while its prompt is made, and while the speed of its answer is printed."""

    model = SimpleNamespace(name="stub")

    def __init__(self) -> None:
        self.conversations: list[list[Any]] = []
        self.text = SimpleNamespace(encode_chat=self.encode_chat)

    def encode_chat(self, messages: list[Any]) -> list[int]:
        self.conversations.append(list(messages))
        os.kill(os.getpid(), signal.SIGINT)
        return [1]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Any]:
        yield SimpleNamespace(text="Yes", token_ids=[2])
        raise AssertionError("the answer went on after Ctrl-C")


class InterruptingFile(io.StringIO):
    def write(self, text: str) -> int:
        if "tokens" in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_ctrl_c_at_any_moment_of_an_answer_keeps_the_session() -> None:
    llm, lines = Interrupting(), iter(["Is it?", "Really?", "/exit"])
    console = Console(file=InterruptingFile())
    Shell(cast(LLM, llm), lambda: next(lines), console).run()
    said = [(message["role"], message["content"]) for message in llm.conversations[1]]
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
