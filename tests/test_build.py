"""From a configuration to an engine."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_model
from minisgl import build
from minisgl.build import build_engine, in_passing_thread
from minisgl.config import Config
from minisgl.errors import ModelError


def test_a_cpu_engine_is_found_and_built_in_threads_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def noted(original: Callable[..., Any], *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*arguments)

    for name in ("locate_model", "build_local_executor"):
        monkeypatch.setattr(build, name, partial(noted, getattr(build, name)))
    config = Config(model=str(save_model(tmp_path)), device="cpu", num_pages=64, max_seq_len_override=256)
    engine = build_engine(config).engine
    try:
        assert len(threads) == 2
        assert not any(thread is threading.main_thread() or thread.is_alive() for thread in threads)
    finally:
        engine.close()


def test_what_fails_in_a_passing_thread_is_raised() -> None:
    def fail() -> None:
        raise ModelError("no model")

    with pytest.raises(ModelError, match="no model"):
        in_passing_thread(fail)
