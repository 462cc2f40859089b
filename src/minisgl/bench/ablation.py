"""`minisgl bench ablation`: each setting against the default on the same workload, in one process."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from minisgl.bench.offline import JSON_HELP, positive
from minisgl.bench.variants import CPU_SCENARIOS, GPU_SCENARIOS, GROUPS, make_variants
from minisgl.cli import SERVER_GROUPS, Parser, add_config_flags, config_from, guarded
from minisgl.config import Config
from minisgl.errors import ConfigError

REPEATS: Final = 3
WIDTH: Final = 150
"""Columns of the table; a terminal that has fewer wraps lines."""


def group_list(text: str) -> tuple[str, ...]:
    """Names of groups, with commas between them."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in GROUPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(GROUPS)}")
    return names


def build_parser() -> Parser:
    """The parser of `minisgl bench ablation`: what to try, and the engine's flags, which are the default it varies."""
    parser = Parser(
        prog="minisgl bench ablation",
        description="Turns one setting at a time away from the configuration given here, over weights loaded once.",
    )
    group = parser.add_argument_group("ablation")
    group.add_argument(
        "--only", type=group_list, default=GROUPS, metavar="A,B", help=f"of {', '.join(GROUPS)} (default: all)"
    )
    group.add_argument(
        "--repeats",
        type=positive,
        default=REPEATS,
        metavar="N",
        help=f"runs of each, of which the median counts (default: {REPEATS})",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP + "; a picture goes beside it")
    add_config_flags(parser, without=SERVER_GROUPS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point of `minisgl bench ablation`; the exit status."""
    parser = build_parser()
    namespace = parser.parse_args(arguments)
    config = config_from(parser, namespace)
    return guarded(
        lambda: run(config, namespace.only, namespace.repeats, namespace.json, arguments),
        debug=config.log_level == "DEBUG",
    )


def run(config: Config, groups: Sequence[str], repeats: int, json: Path | None, arguments: Sequence[str]) -> int:
    """Measure every variant, print the table, and write the report after each; 1 when a variant failed."""
    import torch
    from rich.console import Console

    from minisgl.bench.chart import ablation_table, draw_chart, ratio
    from minisgl.bench.report import card_name, require_writable, slug, write_report
    from minisgl.bench.throughput import report_path
    from minisgl.bench.trials import Measurement, Trials, load, scenario_tokens
    from minisgl.core.weights import progress_bar
    from minisgl.gpu.attention.select import available_backends

    path = report_path(config, json, "ablation")
    require_writable(path)
    console = Console(width=max(WIDTH, Console().width), soft_wrap=True)
    gpu = torch.cuda.is_available() and config.device != "cpu"
    scenarios = GPU_SCENARIOS if gpu else CPU_SCENARIOS
    loaded = load(config, max(map(scenario_tokens, scenarios.values())))
    found = available_backends(torch.device(loaded.config.device))
    backends = [name for name, reason in found.items() if reason is None and (name != "torch" or not gpu)]
    variants = make_variants(loaded.config, groups, backends, gpu)
    if not variants:
        raise ConfigError(f"--only {','.join(groups)}: there is nothing to try on this machine")
    report: dict[str, Any] = {
        "config": dataclasses.asdict(loaded.config),
        "kv_tokens": loaded.kv_tokens,
        "scenarios": {name: dataclasses.asdict(scenario) for name, scenario in scenarios.items()},
    }
    measured: list[Measurement] = []
    trials = Trials(loaded, scenarios, repeats)
    try:
        with progress_bar("trying", len(variants), enabled=True) as advance:
            for variant in variants:
                measured.append(trials.run(variant))
                advance(1)
                if path is not None:
                    rows = [{**dataclasses.asdict(item), "of_default": ratio(item, measured)} for item in measured]
                    write_report(path, "ablation", arguments, {**report, "measurements": rows})
        title = f"{slug(loaded.model.name)} on {card_name() if gpu else 'CPU'}"
        console.print(ablation_table(title, measured))
        if path is not None:
            picture = path.with_suffix(".png")
            drawn = draw_chart(picture, title, measured)
            console.print(f"written to {path}" + (f" and {picture}" if drawn else "; a picture needs minisgl[plot]"))
    finally:
        trials.close()
    return 1 if any(item.error is not None for item in measured) else 0
