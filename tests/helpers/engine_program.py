"""An engine in a process of its own, which answers one batch of prompts after the other: `EngineProgram`.

`python -m helpers.engine_program SETTINGS` reads a line of JSON for each batch, {"prompts", "params"}, and writes one,
the `Answers`. With "announce" it first writes a line when the first tokens of the first prompt are there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TypedDict

from helpers.processes import environment
from minisgl import LLM, SamplingParams

SECONDS = 540  # for the start, and for each batch: kernels are compiled on the way


class Answers(TypedDict):
    """For each prompt tokens and their log-probabilities, and, where they were asked for, those of the prompt's tokens
    from the second on, and the highest at each of their positions. `notes`: the engine's configuration.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    prompt_logprobs: list[list[float]]
    tops: list[list[float]]
    notes: list[str]


class EngineProgram:
    """A running engine with these settings, fields of Config. It starts at the first question."""

    def __init__(self, settings: dict[str, Any]) -> None:
        command, pipe = [sys.executable, "-m", "helpers.engine_program", json.dumps(settings)], subprocess.PIPE
        self._stderr = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True, env=environment()
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout

    def __enter__(self) -> EngineProgram:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> Answers:
        answers: Answers = self._answer_to({"prompts": prompts, "params": params})
        return answers

    def begin(self, prompt: list[int], params: dict[str, Any]) -> None:
        """Have a prompt answered; return when its first token is there, the others are on their way."""
        assert self._answer_to({"prompts": [prompt], "params": [params], "announce": True}) == "begun"

    def errors(self, timeout: float = SECONDS) -> str:
        """What the process wrote to stderr; waits for its end, for so many seconds."""
        self.process.wait(timeout)
        return Path(self._stderr.name).read_text()

    def close(self) -> None:
        self._stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stdout.close()
        self._stderr.close()

    def _answer_to(self, question: dict[str, Any]) -> Any:
        self._stdin.write(json.dumps(question) + "\n")
        self._stdin.flush()
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        line = self._stdout.readline()
        timer.cancel()
        if not line:
            raise RuntimeError(f"the engine ended with {self.process.wait()}: {self.errors()[-4000:]}")
        return json.loads(line)


def ask(settings: dict[str, Any], prompts: list[list[int]], params: list[dict[str, Any]]) -> Answers:
    with EngineProgram(settings) as engine:
        return engine.ask(prompts, params)


def answer(llm: LLM, prompts: list[list[int]], params: list[dict[str, Any]]) -> Answers:
    found = llm.generate(prompts, [SamplingParams(**fields) for fields in params], progress=False)
    scores = [[score for score in completion.prompt_logprobs or () if score is not None] for completion in found]
    return {
        "tokens": [completion.token_ids for completion in found],
        "logprobs": [[score.logprob for score in completion.logprobs or ()] for completion in found],
        "prompt_logprobs": [[score.logprob for score in prompt] for prompt in scores],
        "tops": [[max(score.top_logprobs, default=score.logprob) for score in prompt] for prompt in scores],
        "notes": list(llm.notes),
    }


def main() -> None:
    with LLM(progress=False, **json.loads(sys.argv[1])) as llm:
        for line in sys.stdin:
            question = json.loads(line)
            if question.get("announce"):
                for _ in llm.stream(question["prompts"][0], SamplingParams(**question["params"][0])):
                    if question.pop("announce", None):
                        print(json.dumps("begun"), flush=True)
                continue
            print(json.dumps(answer(llm, question["prompts"], question["params"])), flush=True)


if __name__ == "__main__":
    main()
