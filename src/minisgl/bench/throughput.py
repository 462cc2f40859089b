"""Output and total tokens/s of a workload through the offline API; printed, and written as JSON."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from minisgl.bench.report import require_writable, write_report
from minisgl.bench.workload import Workload, WorkloadSpec, make_workload
from minisgl.config import Config
from minisgl.llm import LLM
from minisgl.models.locate import locate_model

CPU_SPEC: Final = WorkloadSpec(num_requests=16, input_len=(32, 128), output_len=(32, 128))
"""What is measured on a CPU when nothing else is asked for: half a minute instead of half an hour."""


def measure(llm: LLM, workload: Workload) -> dict[str, Any]:
    """Run the workload after a short warm-up; tokens, seconds, and tokens/s."""
    warm_up = make_workload(WorkloadSpec(num_requests=2, input_len=(8, 8), output_len=(4, 4), seed=-1), 2)
    llm.generate(warm_up.prompts, warm_up.params, progress=False)
    started = time.perf_counter()
    answers = llm.generate(workload.prompts, workload.params)
    seconds = time.perf_counter() - started
    tokens_in, tokens_out = workload.input_tokens, sum(len(answer.token_ids) for answer in answers)
    return {
        "requests": len(answers),
        "input_tokens": tokens_in,
        "cached_input_tokens": sum(answer.cached_tokens for answer in answers),
        "output_tokens": tokens_out,
        "seconds": seconds,
        "output_tokens_per_second": tokens_out / seconds,
        "total_tokens_per_second": (tokens_in + tokens_out) / seconds,
    }


def default_spec(config: Config) -> WorkloadSpec:
    """The published workload on a GPU, the small one on a CPU."""
    return WorkloadSpec() if device(config) == "cuda" else CPU_SPEC


def device(config: Config) -> str:
    """Where the model will run."""
    return "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"


def run(config: Config, spec: WorkloadSpec, against: str | None, json: Path | None, arguments: Sequence[str]) -> int:
    """Measure, print, and write to `json`; the exit status. `against` names what to compare with."""
    require_writable(json)
    console = Console(soft_wrap=True)
    if against is not None:
        from minisgl.bench.compare import comparable

        config = comparable(config)
    with LLM(config=config) as llm:
        for note in llm.notes:
            console.print(note, highlight=False, markup=False)
        report: dict[str, Any] = {"workload": dataclasses.asdict(spec), "config": list(llm.notes)}
        report["figures"] = measure(llm, make_workload(spec, llm.model.vocab_size))
        console.print(figures_table(llm.model.name, spec, report["figures"]))
        if against is not None:
            report["comparison"] = run_comparison(llm, config, spec, console)
    if json is not None:
        write_report(json, "offline", arguments, report)
    return 0


def run_comparison(llm: LLM, config: Config, spec: WorkloadSpec, console: Console) -> dict[str, Any]:
    """Compare with transformers, print the table, return the figures."""
    from minisgl.bench.compare import BATCH, ROUNDS, compare

    folder = locate_model(config.model, config.model_source, dtype="float32")
    result = compare(llm, folder, device(config), spec)
    table = Table("output tokens/s", "minisgl", "transformers", "ratio", title=f"medians of {ROUNDS} rounds in turns")
    rows = (
        ("one request, decode", result.ours_decode, result.theirs_decode, result.decode_ratio),
        (f"{BATCH} together / one by one", result.ours_throughput, result.theirs_throughput, result.throughput_ratio),
    )
    for name, ours, theirs, ratio in rows:
        table.add_row(name, f"{ours:.1f}", f"{theirs:.1f}", f"{ratio:.2f}x")
    console.print(table)
    console.print(f"the same greedy tokens in {result.same} of {result.requests} requests")
    ratios = {"decode_ratio": result.decode_ratio, "throughput_ratio": result.throughput_ratio}
    return {"with": "transformers", **dataclasses.asdict(result), **ratios}


def figures_table(model: str, spec: WorkloadSpec, figures: dict[str, Any]) -> Table:
    """The figures, a row each."""
    span = "{0[0]}–{0[1]}".format
    table = Table(title=f"{model}: prompts {span(spec.input_len)}, outputs {span(spec.output_len)}, seed {spec.seed}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:,.2f}")
    return table
