"""The files that a chat request passes through before its first token are those that the architecture page lists."""

import asyncio
import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import minisgl
from helpers.engine_thread import EngineThread
from helpers.serving import web
from helpers.tiny_models import save_model
from minisgl.build import build_engine
from minisgl.config import Config
from minisgl.server.metrics import Metrics

PACKAGE = Path(minisgl.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
LIMIT = 25


class PassedFiles:
    """Collects the files of the package whose functions run on any thread, while it is `open`."""

    def __init__(self) -> None:
        self.open = False
        self.files: set[str] = set()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_filename
        if self.open and event == "call" and name.startswith(str(PACKAGE)):
            self.files.add(str(Path(name).relative_to(PACKAGE).with_suffix("")))


def test_a_chat_request_passes_through_the_files_that_the_page_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = PassedFiles()
    built = build_engine(Config(model=str(save_model(tmp_path)), device="cpu", num_pages=64, max_seq_len_override=256))
    on_tokens = Metrics.on_tokens

    def first_token(*arguments: Any) -> None:  # at the server, behind the news of the request's admission
        passed.open = False
        on_tokens(*arguments)

    monkeypatch.setattr(Metrics, "on_tokens", first_token)

    async def main() -> None:
        async with web(tmp_path, built.engine.model, EngineThread(built.engine).start) as side:
            passed.open = True
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": True}
            answer = await side.http.post("/v1/chat/completions", json=body)
            assert answer.text.endswith("data: [DONE]\n\n")

    threading.setprofile(passed.profile)
    sys.setprofile(passed.profile)
    try:
        asyncio.run(main())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        built.engine.close()
    listed = re.findall(r"`([a-z_/]+)\.py`", PAGE.read_text().split("before its first token")[1].split("\n## ")[0])
    assert sorted(passed.files) == sorted(listed)
    assert len(listed) <= LIMIT
