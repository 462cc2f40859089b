"""What the sessions of third-party clients share: where the clients are, and a server of the bundled model."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.processes import server
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
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Of a server of the bundled model, which gets a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    for file in locate_model(None).iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(QWEN_TOOLS, "utf-8")
    return "--model", str(folder), "--num-pages", "512", "--served-model-name", MODEL


@pytest.fixture(scope="session")
def url(flags: tuple[str, ...]) -> Iterator[str]:
    with server(*flags) as (_, address):
        yield address
