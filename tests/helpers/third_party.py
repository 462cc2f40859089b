"""Third-party clients in an environment of their own, as `make test-clients` makes it."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

MODEL = "smollm2-with-tools"
CLIENT_TESTS = Path(__file__).parent.parent / "clients"


LITELLM = ("chat", "stream", "async", "required tool", "streamed tool", "structured", "error")
# The clients' programs in tests/clients/sessions, and the steps that each does.
SESSIONS = {
    "openai_session.py": (
        "models", "chat", "stream", "async", "choices and logprobs", "required tool", "streamed tool", "tool answer",
        "structured", "streamed structured", "completion", "errors",
    ),
    "openai_session.mjs": (
        "models", "chat", "stream", "stream helper", "leave", "named tool", "streamed tool", "tool answer",
        "structured", "completion", "errors",
    ),
    "langchain_session.py": (
        "chat", "stream", "batch", "logprobs", "required tool", "streamed tool", "tool answer",
        "structured by json_schema", "structured by function_calling", "completion", "completion stream",
    ),
    "litellm_session.py": (
        *(f"openai: {step}" for step in LITELLM), *(f"hosted_vllm: {step}" for step in LITELLM), "text completion",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clients:
    """The environment that `make test-clients` made: Python's clients in `bin`, Node's in `node/node_modules`."""

    folder: Path
    home: Path

    def run(
        self, program: str, *arguments: str, environ: Mapping[str, str] = {}, text: str = "", seconds: float = 240
    ) -> str:
        """What a program prints; any exit status but 0 fails the test with the output.

        It has a home of its own, no proxy, and no hub to be asked.
        """
        path = self.folder / "bin" / program
        command = [str(path) if path.exists() else program, *arguments]
        env = {"HOME": str(self.home), "PATH": os.environ["PATH"], "CLIENTS_NODE": str(self.folder / "node")}
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        env |= {"OPENAI_API_KEY": "none", "NO_PROXY": "*", **environ}
        done = subprocess.run(
            command, env=env, cwd=self.home, timeout=seconds, input=text, capture_output=True, text=True, check=False
        )
        print(done.stdout)
        if done.returncode:
            pytest.fail(f"{program} exits with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        return done.stdout

    def session(self, name: str, url: str) -> dict[str, Any]:
        """Run a session's script against a server; each line that it prints says which step it did and what it saw."""
        program = "node" if name.endswith(".mjs") else "python"
        script, environ = CLIENT_TESTS / "sessions" / name, {"PYTHONPATH": str(CLIENT_TESTS.parent)}
        printed = self.run(program, str(script), f"{url}/v1", MODEL, environ=environ)
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"step"')]
        return {line["step"]: line["seen"] for line in lines}
