"""What the sessions of third-party clients share: where the clients are, and a server of the bundled model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.templates import QWEN_TOOLS
from helpers.third_party import CLIENT_TESTS, MODEL, Clients
from minisgl.formats.hub import locate_model


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Clients:
    folder = Path(os.environ.get("CLIENTS_VENV") or CLIENT_TESTS.parent.parent / ".venv-clients").absolute()
    if not (folder / "bin" / "python").exists():
        pytest.fail(f"there are no clients in {folder}: `make test-clients` installs and runs them")
    return Clients(folder, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the bundled model, which gets a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    for file in locate_model(None).iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(QWEN_TOOLS, "utf-8")
    options = ["--port", "0", "--num-pages", "512", "--served-model-name", MODEL]
    command = [sys.executable, "-m", "minisgl", "--model", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LOG_LEVEL": "WARNING"})
    assert process.stdout is not None
    try:
        yield next(found[1] for line in process.stdout if (found := re.search(r"is ready.*(http://\S+)/v1", line)))
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        process.wait(60)
