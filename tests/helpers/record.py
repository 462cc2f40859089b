"""`pytest --record FILE`: how the tests ended and what they measured, with hardware and versions, as JSON."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minisgl_bench.report import gpu_name, hardware, versions


class Recorder:
    """Collects the outcome of every test, and what tests gave to the fixture `record_property`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.failed: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.measured: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: by its call, or by the set-up or tear-down that ended it."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        self.counts[outcome] += 1
        if outcome == "failed":
            self.failed.append(report.nodeid)
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        if report.user_properties:
            self.measured[report.nodeid] = dict(report.user_properties)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        record = {
            "command": " ".join(["pytest", *session.config.invocation_params.args]),
            "hardware": hardware(),
            "versions": versions(),
            "seconds": round(time.monotonic() - self.started, 1),
            **{name: self.counts[name] for name in ("passed", "failed", "skipped", "xfailed")},
            "failed_tests": self.failed,
            "skip_reasons": dict(self.skipped.most_common()),
            "measured": self.measured,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=2) + "\n")


def record_to(config: pytest.Config, name: str) -> None:
    """Record this run in the file `name`, in which `{gpu}` stands for the GPU's name."""
    config.pluginmanager.register(Recorder(Path(name.replace("{gpu}", gpu_name()))), "minisgl-record")
