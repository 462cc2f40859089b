"""What users install and deploy: the package's metadata, and the files of deploy/ against the program they start."""

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import minisgl
from minisgl.config import Config, flags_of
from minisgl.ray_app import GRACE_SECONDS, ArgumentParser, flags_from, parse

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPLOYED = [ROOT / "Dockerfile", *sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file())]
MANIFESTS = [
    path for path in [*DEPLOYED, *sorted((ROOT / ".github").rglob("*.yml"))] if path.suffix in (".yaml", ".yml")
]
FLAGS = {flag for field in dataclasses.fields(Config) for flag in flags_of(field)}
BLOB = "https://github.com/sgl-project/mini-sglang/blob/main/"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def server_flags(arguments: list[str]) -> dict[str, str]:
    """Each flag with the word after it; every flag must be the server's."""
    found = {word: after for word, after in zip(arguments, [*arguments[1:], ""], strict=True) if word.startswith("--")}
    assert set(found) <= FLAGS
    return found


def drain_timeout(arguments: list[str]) -> float:
    return float(server_flags(arguments).get("--drain-timeout", Config().drain_timeout))


def test_the_version_is_that_of_the_installed_package() -> None:
    assert minisgl.__version__ == version("minisgl")


def test_a_source_tree_that_is_not_installed_has_a_version() -> None:
    code = (
        "import importlib.metadata as m\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "import minisgl; print(minisgl.__version__)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.stdout == "0+unknown\n"


def test_links_of_the_readme_are_absolute_and_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith("https://")] == []
    raw = BLOB.replace("github.com", "raw.githubusercontent.com").replace("/blob", "")
    own = [link.removeprefix(BLOB).removeprefix(raw) for link in links if "mini-sglang/" in link]
    assert [path for path in own if not (ROOT / path).exists()] == []
    assert len(own) > 10


def test_every_data_file_of_the_packages_is_declared() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    declared = {
        path for package, globs in data.items() for glob in globs for path in (ROOT / "src" / package).glob(glob)
    }
    ignored = {".py", ".pyc"}
    present = {
        path
        for package in data
        for path in (ROOT / "src" / package).rglob("*")
        if path.is_file() and path.suffix not in ignored
    }
    assert declared == present


def test_every_dependency_has_both_ends_and_make_takes_a_torch_between_them() -> None:
    for dependency in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", dependency), dependency
    (pinned,) = re.findall(r"^torch==2\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (least, below) = re.findall(r"2\.(\d+)", next(d for d in PROJECT["dependencies"] if d.startswith("torch")))
    assert int(least) <= int(pinned) < int(below)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_yaml_parses(path: Path) -> None:
    assert list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_starts_the_server_with_its_flags(name: str) -> None:
    (compose,) = documents(name)
    service = compose["services"]["minisgl"]
    base = documents("compose.yaml")[0]["services"]["minisgl"]
    assert float(base["stop_grace_period"].removesuffix("s")) > drain_timeout(service["command"])
    assert f" AS {service['build']['target']}\n" in (ROOT / "Dockerfile").read_text()
    for volume in base["volumes"]:
        assert volume.split(":")[1] in (ROOT / "Dockerfile").read_text()


def test_compose_mounts_files_that_exist() -> None:
    services = documents("compose.yaml")[0]["services"].values()
    mounts = [volume for service in services for volume in service["volumes"] if volume.startswith(".")]
    assert len(mounts) == 4
    assert [mount for mount in mounts if not (ROOT / "deploy" / mount.split(":")[0]).exists()] == []


def test_kubernetes_starts_the_server_with_its_flags_and_waits_for_its_end() -> None:
    pod = of_kind("k8s/minisgl.yaml", "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (before,) = (int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"] if word.isdigit())
    assert pod["terminationGracePeriodSeconds"] > before + drain_timeout(container["args"])


def test_kuberay_starts_the_application_with_its_flags_and_waits_for_its_end() -> None:
    service = of_kind("k8s/rayservice.yaml", "RayService")["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    module, function = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
    config, scale = parse(flags_from(application["args"]), ArgumentParser)
    cluster = service["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (scale.least, scale.most) == (workers["minReplicas"], workers["maxReplicas"])
    (pin,) = (re.search(r"==([\d.]+)\.\*", extra) for extra in PROJECT["optional-dependencies"]["ray"])
    assert pin is not None
    assert cluster["rayVersion"].startswith(f"{pin[1]}.")
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] > config.drain_timeout + GRACE_SECONDS
        assert f"FROM runtime-cuda AS {container['image'].partition(':')[2]}\n" in (ROOT / "Dockerfile").read_text()
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == str(config.tp)


def test_probes_ask_endpoints_that_need_no_key() -> None:
    (container,) = of_kind("k8s/minisgl.yaml", "Deployment")["spec"]["template"]["spec"]["containers"]
    asked = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert asked == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert "http://127.0.0.1:1919/health" in (ROOT / "Dockerfile").read_text()
    assert {port["containerPort"] for port in container["ports"]} == {Config().port}


def test_autoscaling_counts_a_metric_of_the_server() -> None:
    (metric,) = of_kind("k8s/autoscaling.yaml", "HorizontalPodAutoscaler")["spec"]["metrics"]
    (rule,) = documents("k8s/prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"] == "minisgl_num_requests_queued"
    assert "minisgl:num_requests_queued" in rule["seriesQuery"]
    assert "`num_requests_queued`" in (ROOT / "docs/operation.md").read_text()


def test_the_image_runs_as_a_number_and_starts_the_server() -> None:
    text = (ROOT / "Dockerfile").read_text()
    last = text.rpartition("FROM ")[2]
    assert last.startswith("runtime AS cpu")
    assert set(re.findall(r"^USER (.+)", text, re.MULTILINE)) == {"0", "1000:1000"}
    assert re.findall(r"^USER (.+)", text, re.MULTILINE)[-1] == "1000:1000"
    server_flags(json.loads(re.findall(r"^ENTRYPOINT (\[.+\])", text, re.MULTILINE)[0]))
    for command in re.findall(r'"-c", (".+?")\]', text):
        ast.parse(json.loads(command))


def test_the_unit_starts_the_server_with_its_flags_and_waits_for_its_end() -> None:
    unit = (ROOT / "deploy/systemd/minisgl.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.+)", unit, re.MULTILINE)
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)", unit, re.MULTILINE)
    assert int(stop) > drain_timeout(command.split())
