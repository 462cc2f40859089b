"""Sums over ranks with addition and norm: processes that share memory, or streams of one GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.summing import SECONDS, Case, Summing
from minisgl.gpu.kernels import sums

GROWING = [(shots, rows) for rows in (1, 3, 1, 7, 2) for shots in (1, 2)]
"""Calls of both ways in turn, after which the rows have had 10, 8, 4 and 2 calls."""
AGAIN = [(1, 2)] * 5 + [(2, 2)] * 5 + [(2, 1)] * 3 + [(2, 3)] * 3
MANY = [(1, 66), (2, 70), (2, 65), (1, 64)]
"""Rows for many more programs than there are, not all of them multiples of the ranks."""

CASES = {
    "two": Case(world=2, dim=40, dtype="float32", programs=4, calls=GROWING + AGAIN + MANY),
    "three": Case(world=3, dim=64, dtype="float32", programs=8, calls=GROWING + AGAIN),
    "four": Case(world=4, dim=24, dtype="float32", programs=8, calls=GROWING + MANY[1:3]),
    "one, of half words": Case(world=1, dim=40, dtype="float16", programs=4, calls=GROWING),
}
"""Half words from one rank only: the interpreter reads and writes them byte by byte, which a GPU does not."""
ALONE = 1024
"""Beyond, a program fills a multiprocessor. Launched ahead of each other's end, all calls of some ranks would then fill
the one card that all share here, and wait for ranks that find no room; a rank with a card of its own has what it needs.
"""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a card")
def test_processes_sum_as_the_reference_does(case: Case) -> None:
    here = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-m", "helpers.summing", json.dumps(dataclasses.asdict(case))],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": here},
        stderr=subprocess.PIPE, text=True, timeout=SECONDS + 40,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dim", "dtype"),
    [*((name, 40, "float32") for name in CASES), *(("four", 5120, dtype) for dtype in ("bfloat16", "float16"))],
)
def test_streams_sum_as_the_reference_does(name: str, dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(sums, "MAX_PROGRAMS", 16)
    if dim > ALONE:
        monkeypatch.setattr(sums, "launch_options", dict)

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    case = CASES[name]
    summing = Summing(dataclasses.replace(case, dtype=dtype, dim=dim), device, allocate)
    streams = [torch.cuda.Stream() for _ in range(case.world)]  # type: ignore[no-untyped-call]
    for rank in range(case.world):
        summing.load(rank)
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            summing.run(rank)
    torch.cuda.synchronize()
    summing.check()
    for rank in range(case.world):
        summing.check_reset(rank)
