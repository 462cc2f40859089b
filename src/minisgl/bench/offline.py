"""`minisgl bench offline`: its flags. What they start is imported when it is known that it will run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from minisgl.bench.ceilings import parse_ceilings
from minisgl.bench.workload import WorkloadSpec
from minisgl.cli import SERVER_GROUPS, Parser, add_config_flags, config_from, guarded

JSON_HELP: Final = (
    "write figures, hardware, versions and command here (default: benchmark/results/MODEL-CARD-NAME.json on a GPU; "
    "nowhere on a CPU)"
)


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


def positive(text: str) -> int:
    """A count of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least 1")
    return int(text)


def build_parser() -> Parser:
    """The parser of `minisgl bench offline`: the workload's flags and the engine's."""
    parser = Parser(
        prog="minisgl bench offline",
        description="Throughput of a batch of random prompts, EOS ignored. Defaults: the published workload of 256 "
        "requests on a GPU, a smaller one on a CPU.",
    )
    group = add_workload_flags(parser)
    group.add_argument(
        "--compare",
        choices=("transformers",),
        help="then compare with it on the same prompts, greedy, float32: one request alone, and eight",
    )
    group.add_argument(
        "--ceilings", type=parse_ceilings, metavar="read=X,flops=X",
        help="bytes/s and flop/s that the floor is computed from (default: measured on the GPU; no floor on a CPU)",
    )  # fmt: skip
    group.add_argument(
        "--no-profile", dest="profile", action="store_false", help="skip the second, traced run that splits the time"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    add_config_flags(parser, without=SERVER_GROUPS)
    return parser


def add_workload_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the fields of WorkloadSpec, and return their group."""
    group = parser.add_argument_group("workload")
    group.add_argument("--num-requests", type=positive, metavar="N", help="requests (default: 256; 16 on a CPU)")
    ranges = "(default: 100:1024; 32:128 on a CPU)"
    group.add_argument("--input-len", type=length_range, metavar="A:B", help=f"tokens in a prompt {ranges}")
    group.add_argument("--output-len", type=length_range, metavar="A:B", help=f"tokens generated {ranges}")
    group.add_argument("--seed", type=int, metavar="N", help="of the workload (default: 0)")
    group.add_argument("--temperature", type=float, metavar="X", help="of the sampling (default: 0.6)")
    return group


def workload_spec(namespace: argparse.Namespace, default: WorkloadSpec) -> WorkloadSpec:
    """The default with what was said put over it."""
    names = [field.name for field in dataclasses.fields(WorkloadSpec)]
    said = {name: value for name in names if (value := getattr(namespace, name)) is not None}
    return dataclasses.replace(default, **said)


def main(arguments: Sequence[str]) -> int:
    """Entry point of `minisgl bench offline`; the exit status."""
    parser = build_parser()
    namespace = parser.parse_args(arguments)
    config = config_from(parser, namespace)

    def start() -> int:
        from minisgl.bench import throughput

        options = throughput.Options(
            against=namespace.compare, ceilings=namespace.ceilings, profile=namespace.profile, json=namespace.json
        )
        spec = workload_spec(namespace, throughput.default_spec(config))
        return throughput.run(config, spec, options, arguments)

    return guarded(start, debug=config.log_level == "DEBUG")
