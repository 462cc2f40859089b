"""Kernels that write to other ranks' memory: the ranks are processes that share memory, or streams of one GPU."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.fused_kernel_ranks import SECONDS, Case, FusedRun
from helpers.processes import environment
from helpers.tp_cases import MAX_SEQ_LEN, NOWHERE, SPECS, config, generate
from minisgl.gpu.executor import build_local_executor
from minisgl.gpu.kernels import all_reduce

ENGINE_SECONDS = 240
GROWING = [(shots, rows) for rows in (1, 3, 1, 7, 2) for shots in (1, 2)]
"""One shot and two in turn, after which the rows have had 10, 8, 4 and 2 calls."""
AGAIN = [(1, 2)] * 5 + [(2, 2)] * 5 + [(2, 1)] * 3 + [(2, 3)] * 3
MANY = [(1, 66), (2, 70), (2, 65), (1, 64)]  # more rows than programs, not all of them multiples of the ranks

CASES = {
    "two": Case(world=2, dim=40, dtype="float32", programs=4, calls=GROWING + AGAIN + MANY),
    "three": Case(world=3, dim=64, dtype="float32", programs=8, calls=GROWING + AGAIN),
    "four": Case(world=4, dim=24, dtype="float32", programs=8, calls=GROWING + MANY[1:3]),
    "one, of half words": Case(world=1, dim=40, dtype="float16", programs=4, calls=GROWING),
}
"""Half words from one rank only: the interpreter reads and writes them byte by byte, which a GPU does not."""
ALONE = 1024
"""Beyond, a program fills a multiprocessor. With dependent launches the calls of some ranks would fill the one GPU that
all share here, and wait for ranks that find no room; with a GPU for each rank there is room.
"""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_processes_compute_what_the_reference_does(case: Case) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "helpers.fused_kernel_ranks", json.dumps(dataclasses.asdict(case))],
        env=environment(TRITON_INTERPRET="1"), stderr=subprocess.PIPE, text=True, timeout=SECONDS + 40,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dim", "dtype"),
    [*((name, 40, "float32") for name in CASES), *(("four", 5120, dtype) for dtype in ("bfloat16", "float16"))],
)
def test_streams_compute_what_the_reference_does(
    name: str, dim: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(all_reduce, "MAX_BLOCKS", 16)
    if dim > ALONE:
        monkeypatch.setattr(all_reduce, "launch_options", lambda: {"PDL": False})

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    case = CASES[name]
    run = FusedRun(dataclasses.replace(case, dtype=dtype, dim=dim), device, allocate)
    streams = [torch.cuda.Stream() for _ in range(case.world)]  # type: ignore[no-untyped-call]
    for rank in range(case.world):
        run.load(rank)
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            run.run(rank)
    torch.cuda.synchronize()
    run.check()
    for rank in range(case.world):
        run.check_reset(rank)


@pytest.mark.parametrize("model", ["qwen3-moe", "llama-biased"])
def test_fused_ranks_generate_what_one_device_does(tmp_path: Path, model: str) -> None:
    torch.set_num_threads(1)
    alone = build_local_executor(config(), NOWHERE, SPECS[model], MAX_SEQ_LEN)
    expected = [answer.tokens for answer in generate(alone, SPECS[model], config(), count=8)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "helpers.fused_rank", str(rank), "2", str(tmp_path), model],
            stdout=subprocess.PIPE, text=True, env=environment(TRITON_INTERPRET="1"),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=ENGINE_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    for text in printed:
        found = json.loads(text.splitlines()[-1])
        assert found["tokens"] == expected
        assert min(found["launches"]) > 5, "one shot, two shots, sampling"
