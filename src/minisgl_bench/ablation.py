"""`minisgl bench ablation`: each setting against the default on the same workload, in one process."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
from rich.table import Table

from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.models.progress import progress_bar
from minisgl.ops.attention.select import available_backends
from minisgl_bench.ablation_runner import (
    AblationRunner,
    Conversations,
    Measurement,
    Scenario,
    SystemPrompt,
    Variant,
    load,
    scenario_tokens,
)
from minisgl_bench.plots import draw_ablation
from minisgl_bench.report import console, gpu_name, on_gpu, report_path, slug, table, write_report
from minisgl_bench.workload import WorkloadSpec

PAGE_SIZES: Final = (1, 4, 16, 64, 256)
CHUNK_SIZES: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CPU_CHUNKS: Final = (16, 64, 256)
GRAPH_BATCHES: Final = (0, 4, 64)
PIECEWISE_TOKENS: Final = (0, 512, 2048)
PIECEWISE_CHUNK: Final = 512
"""The chunk that they are tried at: the smaller a step, the more of it is its launch."""
WIDTH: Final = 150
GPU_SCENARIOS: Final[dict[str, Scenario]] = {
    "batch": WorkloadSpec(num_requests=256, input_len=(100, 1024), output_len=(64, 256)),
    "long": WorkloadSpec(num_requests=32, input_len=(2048, 12288), output_len=(64, 128)),
    "chats": Conversations(conversations=64, turns=4, message=512, answer=64),
    "system-prompt": SystemPrompt(requests=256, shared=2048, own=64, answer=64),
}
CPU_SCENARIOS: Final[dict[str, Scenario]] = {
    "batch": WorkloadSpec(num_requests=4, input_len=(16, 48), output_len=(8, 16)),
    "long": WorkloadSpec(num_requests=3, input_len=(64, 160), output_len=(8, 16)),
    "chats": Conversations(conversations=2, turns=3, message=32, answer=8),
    "system-prompt": SystemPrompt(requests=4, shared=96, own=8, answer=8),
}


def make_variants(config: Config, groups: Sequence[str], backends: Sequence[str], gpu: bool) -> list[Variant]:
    """The defaults of the scenarios that these groups need, and everything to compare with them.

    `config` is resolved; a value that it has already is not tried again. Variants that can share an executor follow one
    another, and the default is measured once more at the end: how far the two are apart is the noise.
    """
    cache = "naive" if config.cache == "radix" else "radix"
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        ("overlap", "batch", "off" if config.overlap else "on", {"overlap": not config.overlap}),
        ("chats", "chats", cache, {"cache": cache}),
        ("system-prompt", "system-prompt", cache, {"cache": cache}),
    ]
    for chunk in CHUNK_SIZES if gpu else CPU_CHUNKS:
        rows.append(("chunk-size", "long", str(chunk), {"max_prefill_length": chunk}))
    for batch in GRAPH_BATCHES if gpu else ():
        rows.append(("graphs", "batch", f"up to {batch}" if batch else "off", {"cuda_graph_max_bs": batch}))
    for tokens in PIECEWISE_TOKENS if gpu else ():
        changes = {"piecewise_cuda_graph_max_tokens": tokens, "max_prefill_length": PIECEWISE_CHUNK}
        rows.append(("graphs", "long", f"with prompts, {f'up to {tokens}' if tokens else 'off'}", changes))
    for page_size in PAGE_SIZES:
        rows.append(("page-size", "batch", str(page_size), {"page_size": page_size}))
    for pair in itertools.product(backends, repeat=2) if len(backends) > 1 else ():
        rows.append(("attention", "batch", ",".join(pair), {"attn": ",".join(pair)}))
    tried = [
        Variant(group=group, label=label, scenario=scenario, changes=changes)
        for group, scenario, label, changes in rows
        if group in groups and any(getattr(config, name) != value for name, value in changes.items())
    ]
    scenarios = dict.fromkeys(variant.scenario for variant in tried)
    defaults = [Variant(group="default", label="as configured", scenario=name) for name in scenarios]
    return [*defaults, *tried, *defaults[:1]]


def ratio(item: Measurement, measured: Sequence[Measurement]) -> float | None:
    """A variant's tokens/s over those of the first default on the same scenario; None where either failed."""
    for base in measured:
        if base.variant.group == "default" and base.error is None and base.variant.scenario == item.variant.scenario:
            return None if item.error is not None else item.tokens_per_second / base.tokens_per_second
    return None


def ablation_table(title: str, measured: Sequence[Measurement]) -> Table:
    """A row for each variant."""
    rows = []
    for item in measured:
        row = [item.variant.name, item.variant.scenario]
        if item.error is not None:
            rows.append([*row, f"failed: {item.error}"])
            continue
        share, each = ratio(item, measured), item.each_tokens_per_second
        rows.append(
            [
                *row,
                f"{item.tokens_per_second:,.0f}",
                f"{min(each):,.0f} – {max(each):,.0f}",
                "" if share is None else f"{share:.3f}",
                f"{item.cached_tokens / item.input_tokens:.0%}",
                *(f"{value:.1f}" for value in (item.token_gap_p99_ms, item.token_gap_max_ms, item.build_seconds)),
                f"{item.other_gib:.2f}",
            ]
        )
    columns = ("tokens/s", "from – to", "of default", "cached", "gap p99 ms", "gap max ms", "build s", "other GiB")
    return table(title, ("setting", "workload", *columns), rows, left=2)


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Measure every variant, print the table, and write the report after each; 1 when a variant failed."""
    path, gpu = report_path(config, options.json, "ablation"), on_gpu(config)
    out = console(WIDTH)
    scenarios = GPU_SCENARIOS if gpu else CPU_SCENARIOS
    loaded = load(config, max(map(scenario_tokens, scenarios.values())))
    found = available_backends(torch.device(loaded.config.device))
    backends = [name for name, reason in found.items() if reason is None and (name != "torch" or not gpu)]
    variants = make_variants(loaded.config, options.only, backends, gpu)
    if not variants:
        raise ConfigError(f"--only {','.join(options.only)}: there is nothing to try on this machine")
    report: dict[str, Any] = {
        "config": dataclasses.asdict(loaded.config),
        "kv_tokens": loaded.kv_tokens,
        "scenarios": {name: dataclasses.asdict(scenario) for name, scenario in scenarios.items()},
    }
    measured: list[Measurement] = []
    runner = AblationRunner(loaded, scenarios, options.repeats)
    try:
        with progress_bar("trying", len(variants), enabled=True) as advance:
            for variant in variants:
                measured.append(runner.run(variant))
                advance(1)
                if path is not None:
                    rows = [{**dataclasses.asdict(item), "of_default": ratio(item, measured)} for item in measured]
                    write_report(path, "ablation", arguments, {**report, "measurements": rows})
        title = f"{slug(loaded.model.name)} on {gpu_name() if gpu else 'CPU'}"
        out.print(ablation_table(title, measured))
        if path is not None:
            picture = path.with_suffix(".png")
            bars = [(item.variant, share) for item in measured if (share := ratio(item, measured)) is not None]
            drawn = draw_ablation(picture, title, bars)
            out.print(f"written to {path}" + (f" and {picture}" if drawn else "; a picture needs minisgl[plot]"))
    finally:
        runner.close()
    return 1 if any(item.error is not None for item in measured) else 0
