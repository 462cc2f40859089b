"""From a configuration to an engine."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import save_model
from minisgl import build
from minisgl.build import build_engine, in_passing_thread
from minisgl.config import Config
from minisgl.errors import ModelError


def test_a_cpu_engine_is_built_in_threads_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noted(original: Callable[..., Any], *arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*arguments)

    for name in ("locate_model", "build_local_executor"):
        monkeypatch.setattr(build, name, partial(noted, getattr(build, name)))
    config = Config(model=str(save_model(tmp_path)), device="cpu", num_pages=64, max_seq_len_override=256)
    with closing(build_engine(config).engine):
        assert len(threads) == 2
        assert not any(thread is threading.main_thread() or thread.is_alive() for thread in threads)


def test_what_fails_in_a_passing_thread_is_raised() -> None:
    def fail() -> None:
        raise ModelError("no model")

    with pytest.raises(ModelError, match="no model"):
        in_passing_thread(fail)


def test_an_interrupt_stops_the_work_in_a_passing_thread() -> None:
    ended = threading.Event()

    def endless() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.001)
        finally:
            ended.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_passing_thread(endless)
        assert ended.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
