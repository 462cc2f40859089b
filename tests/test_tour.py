"""The tour runs on a CPU and shows what it says, and the notebook has its cells."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from helpers.notebook import TOUR, notebook


def test_the_notebook_has_the_cells_of_the_file() -> None:
    written = json.loads(TOUR.with_suffix(".ipynb").read_text())
    assert written == notebook(TOUR.read_text()), "write it again: python tests/helpers/notebook.py"


def test_the_tour_shows_what_it_says(tmp_path: Path) -> None:
    root = TOUR.parents[1]
    (tmp_path / "benchmark").symlink_to(root / "benchmark")
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", str(TOUR)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    said = found.stdout
    assert re.search(r"step +8: .*C has 64 tokens from the cache; D has 32 tokens from the cache", said)
    assert "2 pages, used 3 times: 'Once upon a time" in said
    maps = [line for line in said.splitlines() if "were retracted" in line]
    assert all(re.fullmatch(r"[.+*E-J]{40} \d wait, \d were retracted", line) for line in maps)
    assert len(maps) > 5
    assert int(maps[-1].split()[-3]) > 0
    host, device = re.findall(r"^(?:host|device) +(.*)$", said, re.MULTILINE)
    assert set(host) > {"w", "l"}
    assert set(device) >= {"#", "="}
    rows = re.findall(r"^(fcfs|lpm|mine) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", said, re.MULTILINE)
    mean, median, _, worst = ({row[0]: float(row[column]) for row in rows} for column in range(1, 5))
    assert median["mine"] < 0.5 * median["fcfs"]
    assert mean["lpm"] < mean["mine"] < mean["fcfs"]
    assert worst["mine"] < 0.6 * worst["lpm"]
    assert (tmp_path / "policies.png").stat().st_size > 10_000
