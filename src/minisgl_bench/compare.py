"""`minisgl bench compare`: the offline workload through another engine and through this one, one after the other."""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Final

from minisgl.build import probe_machine
from minisgl.config import Config, resolve
from minisgl.core.model_config import read_spec
from minisgl.errors import ConfigError, MinisglError
from minisgl.formats.hub import locate_model
from minisgl.llm import LLM
from minisgl_bench.offline import measure, warm_up
from minisgl_bench.report import Report, engine_path, on_gpu
from minisgl_bench.workload import Workload, make_workload, workload_spec

FIGURES: Final = '{"version"'  # how the line with the figures begins, among whatever else vLLM prints
TAIL: Final = 30


def vllm_settings(config: Config, model: str) -> dict[str, Any]:
    """Our flags as arguments of `vllm.LLM`; what was not said is left to its defaults.

    `config` is resolved. Page size and attention backend are left to vLLM, whose own choice is its best.
    """
    settings: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "tensor_parallel_size": config.tp,
        "dtype": config.dtype,
        "load_format": "dummy" if config.dummy_weight else "auto",
        "enable_prefix_caching": config.cache == "radix",
        "enforce_eager": config.cuda_graph_max_bs == 0,
        "max_num_seqs": config.max_running_requests,
        "max_num_batched_tokens": config.max_prefill_length,
        "gpu_memory_utilization": config.memory_ratio,
        "max_model_len": config.max_seq_len_override,
    }
    return {name: value for name, value in settings.items() if value is not None}


def run_vllm(settings: Mapping[str, Any], workload: Workload, seed: int) -> dict[str, Any]:
    """Output tokens and seconds of vLLM in its own process. Raises MinisglError, the end of its log printed."""
    order = {"settings": settings, "seed": seed, "prompts": workload.prompts, "max_tokens": workload.output_lens}
    order["temperature"] = workload.params[0].temperature
    command = [sys.executable, "-m", "minisgl_bench.vllm_process"]
    done = subprocess.run(command, input=json.dumps(order), stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    found = [line for line in lines if line.startswith(FIGURES)]
    if done.returncode != 0 or not found:
        print("\n".join(lines[-TAIL:]), file=sys.stderr)  # it logs to stdout
        raise MinisglError(f"vllm ended with status {done.returncode}: see above")
    figures: dict[str, Any] = json.loads(found[-1])
    return figures


def run(config: Config, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if find_spec(options.peer) is None:
        raise ConfigError(f"--with {options.peer}: it is not installed in {sys.prefix}; nothing to compare with")
    report = Report("compare", arguments, engine_path(config, options.json, "vllm"))
    spec, machine = workload_spec(options, on_gpu(config)), probe_machine()
    dtype = resolve(config, machine).config.dtype
    folder = locate_model(config.model, config.model_source, dtype=dtype, weights=not config.dummy_weight)
    model = read_spec(folder)
    resolved = resolve(config, machine, model.checkpoint_dtype).config
    workload = make_workload(spec, model.vocab_size)
    theirs = run_vllm(vllm_settings(resolved, str(folder)), workload, spec.seed)
    with LLM(config=config) as llm:
        warm_up(llm, workload, on_gpu(config))
        ours, _ = measure(llm, workload)
        notes = list(llm.notes)
    rate, their_rate = ours["output_tokens_per_second"], theirs["output_tokens"] / theirs["seconds"]
    ratio = rate / their_rate
    report.figures |= {"workload": dataclasses.asdict(spec), "config": notes, "ours": ours, "theirs": theirs}
    report.figures["ratio"] = ratio
    report.print(f"minisgl {rate:,.1f}, vllm {theirs['version']} {their_rate:,.1f} output tokens/s: ratio {ratio:.3f}")
    report.finish()
    return 0
