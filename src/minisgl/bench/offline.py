"""`minisgl bench offline`: a batch of requests through the offline API, and how fast it went."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minisgl import log
from minisgl.bench.report import require_writable, write_report
from minisgl.bench.workload import Workload, WorkloadSpec, make_workload
from minisgl.cli import Parser, add_config_flags, config_from, guarded
from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.llm import LLM
from minisgl.models.locate import locate_model

CPU_SPEC = WorkloadSpec(num_requests=16, input_len=(32, 128), output_len=(32, 128))
"""What is measured on a CPU when nothing else is asked for: half a minute instead of half an hour."""


def length_range(text: str) -> tuple[int, int]:
    """`A:B` or `N` as an inclusive range of token counts."""
    low, _, high = text.partition(":")
    try:
        bounds = (int(low), int(high or low))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length N or a range A:B") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: lengths are at least 1, the smaller one first")
    return bounds


def build_parser() -> Parser:
    """The parser of `minisgl bench offline`: the workload's flags and the engine's."""
    parser = Parser(
        prog="minisgl bench offline",
        description="Throughput of a batch of random prompts, EOS ignored. Defaults: the published workload of 256 "
        "requests on a GPU, a smaller one on a CPU.",
    )
    group = parser.add_argument_group("workload")
    group.add_argument("--num-requests", type=int, metavar="N", help="requests (default: 256; 16 on a CPU)")
    ranges = "(default: 100:1024; 32:128 on a CPU)"
    group.add_argument("--input-len", type=length_range, metavar="A:B", help=f"tokens in a prompt {ranges}")
    group.add_argument("--output-len", type=length_range, metavar="A:B", help=f"tokens generated {ranges}")
    group.add_argument("--seed", type=int, metavar="N", help="of the workload (default: 0)")
    group.add_argument("--temperature", type=float, metavar="X", help="of the sampling (default: 0.6)")
    group.add_argument(
        "--compare",
        choices=("transformers",),
        help="then compare with it on the same prompts, greedy, float32: one request alone, and eight",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write figures, hardware, versions and command here")
    add_config_flags(parser, without=("interface",))
    return parser


def workload_spec(namespace: argparse.Namespace, default: WorkloadSpec) -> WorkloadSpec:
    """The default with what was said put over it. Raises ConfigError for a value out of range."""
    names = [field.name for field in dataclasses.fields(WorkloadSpec)]
    said = {name: value for name in names if (value := getattr(namespace, name)) is not None}
    spec = dataclasses.replace(default, **said)
    if spec.num_requests < 1:
        raise ConfigError(f"--num-requests must be at least 1, got {spec.num_requests}")
    return spec


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


def run(config: Config, namespace: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure, print and write; the exit status."""
    require_writable(namespace.json)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    spec = workload_spec(namespace, WorkloadSpec() if on_gpu else CPU_SPEC)
    console = Console(soft_wrap=True)
    if namespace.compare:
        from minisgl.bench.compare import comparable

        config = comparable(config)
    with LLM(config=config) as llm:
        for note in llm.notes:
            console.print(note, highlight=False, markup=False)
        report: dict[str, Any] = {"workload": dataclasses.asdict(spec), "config": list(llm.notes)}
        report["figures"] = measure(llm, make_workload(spec, llm.model.vocab_size))
        console.print(figures_table(llm.model.name, spec, report["figures"]))
        if namespace.compare:
            report["comparison"] = run_comparison(llm, config, spec, "cuda" if on_gpu else "cpu", console)
    if namespace.json is not None:
        write_report(namespace.json, "offline", arguments, report)
    return 0


def run_comparison(llm: LLM, config: Config, spec: WorkloadSpec, device: str, console: Console) -> dict[str, Any]:
    """Compare with transformers, print the table, return the figures."""
    from minisgl.bench.compare import BATCH, ROUNDS, compare

    folder = locate_model(config.model, config.model_source, dtype="float32")
    result = compare(llm, folder, device, spec)
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


def main(arguments: Sequence[str]) -> int:
    """Entry point of `minisgl bench offline`; the exit status."""
    parser = build_parser()
    namespace = parser.parse_args(arguments)
    config = config_from(parser, namespace)
    log.configure(config.log_level)
    return guarded(lambda: run(config, namespace, arguments), debug=config.log_level == "DEBUG")
