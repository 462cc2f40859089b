"""A server for each test that asks for one, with the settings of its `serving` marker and a parametrized template."""

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import Serving, serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _sighup() -> Iterator[None]:
    """SIGHUP as a terminal has it, where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
async def server(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Serving]:
    settings: dict[str, Any] = {}
    for marker in reversed(list(request.node.iter_markers("serving"))):
        settings |= marker.kwargs
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "template" in parameters:
        settings["template"] = parameters["template"]
    async with serving(tmp_path, **settings) as running:
        yield running
