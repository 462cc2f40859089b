"""Hints name the tool that made the environment."""

import importlib.util
import sys
from pathlib import Path

import pytest

from minisgl.system import install_command


@pytest.mark.parametrize(
    ("marker", "has_pip", "with_option", "plain"),
    [
        ("", True, "pip install --no-deps a==1", "pip install b c"),
        ("", False, "uv pip install --no-deps a==1", "uv pip install b c"),
        ("pipx_metadata.json", False, "pipx inject venv a==1 --pip-args=--no-deps", "pipx inject venv b c"),
        ("pipx_metadata.json", True, "pipx inject venv a==1 --pip-args=--no-deps", "pipx inject venv b c"),
        (
            "uv-receipt.toml", False, "uv pip install --python {} --no-deps a==1", "uv pip install --python {} b c",
        ),
    ],
)  # fmt: skip
def test_packages_are_installed_by_the_tool_that_made_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, has_pip: bool, with_option: str, plain: str
) -> None:
    prefix = tmp_path / "venv"
    prefix.mkdir()
    if marker:
        (prefix / marker).touch()
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_pip else None)
    expected = [command.format(prefix) for command in (with_option, plain)]
    assert [install_command("a==1", options="--no-deps"), install_command("b", "c")] == expected
