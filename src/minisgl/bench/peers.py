"""`minisgl bench compare`: the offline workload through another engine and through this one, one after the other."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from minisgl.bench.offline import JSON_HELP, add_workload_flags, workload_spec
from minisgl.bench.workload import Workload, WorkloadSpec, make_workload
from minisgl.cli import SERVER_GROUPS, Parser, add_config_flags, config_from, guarded
from minisgl.config import Config
from minisgl.errors import ConfigError, MinisglError

FIGURES: Final = '{"version"'
"""How the line with the figures begins, among whatever else vLLM prints."""
TAIL: Final = 30


def build_parser() -> Parser:
    """The parser of `minisgl bench compare`: the workload's flags and the engine's."""
    parser = Parser(
        prog="minisgl bench compare",
        description="The workload of `minisgl bench offline` through another engine, in a process of its own, and then "
        "through this one, with the same flags as far as both have them.",
    )
    group = add_workload_flags(parser)
    group.add_argument("--with", dest="peer", choices=("vllm",), required=True, help="the other engine")
    group.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    add_config_flags(parser, without=SERVER_GROUPS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point of `minisgl bench compare`; the exit status."""
    parser = build_parser()
    namespace = parser.parse_args(arguments)
    config = config_from(parser, namespace)

    def start() -> int:
        if find_spec(namespace.peer) is None:
            raise ConfigError(f"--with {namespace.peer}: it is not installed in {sys.prefix}; nothing to compare with")
        from minisgl.bench.throughput import default_spec

        spec = workload_spec(namespace, default_spec(config))
        return run(config, spec, namespace.json, arguments)

    return guarded(start, debug=config.log_level == "DEBUG")


def vllm_settings(config: Config, model: str) -> dict[str, Any]:
    """Our flags as arguments of `vllm.LLM`; what was not said is left to its defaults.

    `config` is resolved. Page size and attention backend are left to vLLM, whose own choice is its best.
    """
    said: dict[str, Any] = {
        "max_num_seqs": config.max_running_requests,
        "max_num_batched_tokens": config.max_prefill_length,
        "gpu_memory_utilization": config.memory_ratio,
        "max_model_len": config.max_seq_len_override,
    }
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": config.tp,
        "dtype": config.dtype,
        "load_format": "dummy" if config.dummy_weight else "auto",
        "enable_prefix_caching": config.cache == "radix",
        "enforce_eager": config.cuda_graph_max_bs == 0,
        **{name: value for name, value in said.items() if value is not None},
    }


def run_vllm(settings: Mapping[str, Any], workload: Workload, seed: int) -> dict[str, Any]:
    """Output tokens and seconds of vLLM in a process of its own, in our process group.

    Raises MinisglError when it fails, after printing the end of what it said.
    """
    order = {
        "settings": settings,
        "seed": seed,
        "prompts": workload.prompts,
        "max_tokens": [params.max_tokens for params in workload.params],
        "temperature": workload.params[0].temperature,
    }
    command = [sys.executable, "-m", "minisgl.bench.vllm_child"]
    done = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    found = [line for line in lines if line.startswith(FIGURES)]
    if done.returncode != 0 or not found:
        print("\n".join(lines[-TAIL:]), file=sys.stderr)  # it logs to stdout
        raise MinisglError(f"vllm ended with status {done.returncode}: see above")
    figures: dict[str, Any] = json.loads(found[-1])
    return figures


def run(config: Config, spec: WorkloadSpec, json_path: Path | None, arguments: Sequence[str]) -> int:
    """Measure both, print rates and ratio, write the report; the exit status."""
    from rich.console import Console

    from minisgl.bench.report import require_writable, write_report
    from minisgl.bench.throughput import device, measure, report_path, warm_up
    from minisgl.build import probe_machine
    from minisgl.config import resolve
    from minisgl.core.model_config import read_spec
    from minisgl.formats.hub import locate_model
    from minisgl.llm import LLM

    path = report_path(config, json_path, "vllm")
    require_writable(path)
    console = Console(soft_wrap=True)
    machine = probe_machine()
    guess = resolve(config, machine).config
    folder = locate_model(config.model, config.model_source, dtype=guess.dtype, weights=not config.dummy_weight)
    model = read_spec(folder)
    resolved = resolve(config, machine, model.checkpoint_dtype).config
    workload = make_workload(spec, model.vocab_size)
    theirs = run_vllm(vllm_settings(resolved, str(folder)), workload, spec.seed)
    with LLM(config=config) as llm:
        warm_up(llm, workload, device(config) == "cuda")
        ours, _ = measure(llm, workload)
        notes = list(llm.notes)
    rates = (ours["output_tokens_per_second"], theirs["output_tokens"] / theirs["seconds"])
    text = f"minisgl {rates[0]:,.1f}, vllm {theirs['version']} {rates[1]:,.1f} output tokens/s"
    console.print(f"{text}: ratio {rates[0] / rates[1]:.3f}", highlight=False)
    if path is not None:
        report = {"workload": dataclasses.asdict(spec), "config": notes, "ours": ours, "theirs": theirs}
        write_report(path, "compare", arguments, {**report, "ratio": rates[0] / rates[1]})
        console.print(f"written to {path}", highlight=False, markup=False)
    return 0
