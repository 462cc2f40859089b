"""Chat with the model in the terminal; Ctrl-C stops an answer and keeps the session."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console

from minisgl.config import Config, cache_folder
from minisgl.core.types import SamplingParams
from minisgl.errors import InvalidRequestError
from minisgl.llm import LLM, Message

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, /help shows this; Ctrl-C stops an answer"


class Shell:
    """One conversation. `read` returns the user's next line and raises EOFError when there is none."""

    def __init__(self, llm: LLM, read: Callable[[], str], console: Console) -> None:
        self.llm = llm
        self.read = read
        self.console = console
        self.messages: list[Message] = []

    def run(self) -> None:
        self.console.print(f"[bold]{self.llm.model.name}[/bold]", HELP, highlight=False)
        while True:
            try:
                line = self.read().strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line == "/exit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.ask(line)

    def command(self, line: str) -> None:
        text = HELP if line == "/help" else f"unknown command {line}; {HELP}"
        if line == "/reset":
            self.messages.clear()
            text = "the conversation starts anew"
        self.console.print(text, markup=False, highlight=False)

    def ask(self, line: str) -> None:
        """Stream an answer; what was printed of it before Ctrl-C stays in the conversation."""
        self.messages.append({"role": "user", "content": line})
        interrupts: list[int] = []  # what Ctrl-C adds to; an exception could interrupt a step
        before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        try:
            answer = self.stream(self.llm.text.encode_chat(self.messages), interrupts)
        except InvalidRequestError as error:
            self.messages.pop()
            self.console.print(f"{error.message} (/reset starts anew)", style="red", markup=False)
            return
        finally:
            signal.signal(signal.SIGINT, before)
        self.messages.append({"role": "assistant", "content": answer})

    def stream(self, prompt: list[int], interrupts: Sequence[int]) -> str:
        """Print an answer as it comes, until there are `interrupts`, and its speed; returns what was printed."""
        parts: list[str] = []
        tokens, started, first = 0, time.perf_counter(), None
        with closing(self.llm.stream(prompt, SamplingParams(temperature=0.6, top_p=0.95))) as deltas:
            for delta in deltas:
                first = first or time.perf_counter()
                tokens += len(delta.token_ids)
                parts.append(delta.text)
                self.console.out(delta.text, end="", highlight=False)
                self.console.file.flush()
                if interrupts:
                    break
        stopped = " (stopped)" if interrupts else ""
        self.console.print("\n" + speed(tokens, started, first) + stopped, style="dim", highlight=False)
        return "".join(parts)


def speed(tokens: int, started: float, first: float | None) -> str:
    """Tokens, decode rate in tokens/s, and time to first token in seconds, of one answer."""
    if first is None:
        return "no tokens"
    decode = time.perf_counter() - first
    rate = f"{(tokens - 1) / decode:.1f} tokens/s, " if tokens > 1 and decode > 0 else ""
    return f"{tokens} tokens, {rate}first after {first - started:.2f} s"


def open_history() -> History:
    """The lines of earlier sessions; where no file can be written, only those of this one."""
    file = os.path.join(cache_folder(), "shell_history")
    try:
        os.makedirs(cache_folder(), mode=0o700, exist_ok=True)
        with open(file, "ab"):
            return FileHistory(file)
    except OSError:
        return InMemoryHistory()


def run_shell(config: Config) -> None:
    """Load the model and chat. Without a terminal, lines are read from standard input."""
    read: Callable[[], str] = input
    with LLM(config=config) as llm:
        if sys.stdin.isatty():
            session: PromptSession[str] = PromptSession("> ", history=open_history())
            read = session.prompt
        Shell(llm, read, Console(soft_wrap=True)).run()
