"""Hints install into the environment that runs."""

import importlib.util
import sys

import pytest

from minisgl.system import install_command


@pytest.mark.parametrize(
    ("has_pip", "tool"), [(True, "/a/python -m pip install"), (False, "uv pip install --python /a/python")]
)
def test_packages_are_installed_into_the_environment_that_runs(
    monkeypatch: pytest.MonkeyPatch, has_pip: bool, tool: str
) -> None:
    monkeypatch.setattr(sys, "executable", "/a/python")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_pip else None)
    assert install_command("a==1", options="--no-deps") == f"{tool} --no-deps a==1"
    assert install_command("b", "c[d]") == f"{tool} b 'c[d]'"
