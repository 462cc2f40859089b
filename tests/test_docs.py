"""The documentation names every flag and switch, and its links lead somewhere."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from minisgl.config import Config, flags_of
from minisgl.core.model_config import ARCHITECTURES
from minisgl.core.types import EngineStats
from minisgl.server.metrics import Metrics, MetricsPage

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_features_name_every_flag_spelling_switch_and_choice() -> None:
    text = (ROOT / "docs" / "features.md").read_text()
    for field in dataclasses.fields(Config):
        words = [*flags_of(field), *field.metadata["choices"], *filter(None, [field.metadata["env"]])]
        missing = [word for word in words if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)]
        assert not missing, field.name


def test_features_name_every_architecture() -> None:
    text = (ROOT / "docs" / "features.md").read_text()
    assert [name for name in ARCHITECTURES if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_the_architecture_page_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "src" / "minisgl"
    files = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert [str(path) for path in files if f"| `{path}` |" not in text] == []
    assert len(text.splitlines()) <= 250


def test_operation_and_the_dashboard_name_the_metrics_there_are() -> None:
    text = (ROOT / "docs" / "operation.md").read_text()
    families = MetricsPage(Metrics(), EngineStats(), True, "m", 16).collect()
    kinds = {f.name.removeprefix("minisgl:"): f.type for f in families if f.name.startswith("minisgl:")}
    names = [f"{name}_total" if kind == "counter" else name for name, kind in kinds.items()]
    assert [name for name in names if f"`{name}`" not in text and f"`{name}{{" not in text] == []
    known = {*names, *(f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram")}
    dashboard = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"minisgl:(\w+)", target["expr"])
    }
    assert len(dashboard["panels"]) == 12
    assert used <= known
    assert {"num_requests_running", "time_to_first_token_seconds_bucket", "request_success_total"} <= used
