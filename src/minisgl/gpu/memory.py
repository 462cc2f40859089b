"""How many KV pages fit into a device's memory beside weights, activations and CUDA graphs.

The largest step is run to see what activations take; what graphs take is computed, as they are captured last.
"""

from __future__ import annotations

import contextlib
import dataclasses
from copy import copy
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import torch

from minisgl.config import Config
from minisgl.core.decoder import Decoder
from minisgl.core.kv_cache import allocate_kv, page_bytes
from minisgl.core.model_config import ModelSpec
from minisgl.core.model_runner import ModelRunner
from minisgl.core.plan import StepPlan
from minisgl.core.quantization import FP8
from minisgl.core.request_state import RequestState, RequestTable
from minisgl.core.types import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, Request, SamplingParams
from minisgl.core.weights import QUANTIZED, TORCH_DTYPES, Sharder, held_elements
from minisgl.errors import ConfigError
from minisgl.gpu.attention.interface import captures_prefill
from minisgl.gpu.cuda_graphs import MAX_CHUNKS, graph_sizes, piecewise_max_tokens, piecewise_sizes

GIB = 2**30
CPU_KV_BYTES = 2 * GIB
CONTROL_GROUP = Path("/sys/fs/cgroup")
DEFAULT_RATIO = 0.9
WARM_UP_TOKENS = 16  # of the prompt in `warm_up`, and more than its decodes reach
GRAPH_BYTES = 256 << 10  # the driver's own for a graph of some ten kernels; decode graphs are too few to count


def available_memory(device: torch.device) -> int:
    """Bytes that are free: of the GPU, else of what the system and the control group leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(system_memory(), group_memory())


def total_memory(device: torch.device) -> int:
    """Bytes in all, free or not: the GPU's, else the system's or the control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min(system_memory("MemTotal"), group_limit())


def system_memory(name: str = "MemAvailable") -> int:
    """A line of /proc/meminfo in bytes; MemAvailable is what a new program can take without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo does not have {name}, from which to know how many KV pages fit")


def group_limit(group: Path = CONTROL_GROUP) -> int:
    """Bytes that the control group (version 2) allows; without a limit, more than there are."""
    limit = group / "memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    return 2**63 - 1 if most == "max" else int(most)


def group_memory(group: Path = CONTROL_GROUP) -> int:
    """Bytes that the control group's limit leaves."""
    current = group / "memory.current"
    return max(0, group_limit(group) - (int(current.read_text()) if current.exists() else 0))


def graph_bytes(config: Config, spec: ModelSpec, vocab: int, dtype: torch.dtype, max_seq_len: int) -> int:
    """Bytes of all CUDA graphs that `config` asks for, on a rank with the share `spec` and `vocab` tokens of the head.

    Qwen3-0.6B's decode graphs took 134 MB of an H200, before there was one for uneven rows; with it this says 134.
    """
    total, item, table = 0, dtype.itemsize, 4 * -(-max_seq_len // config.page_size)  # of a row
    if rows := config.cuda_graph_max_bs:
        total += rows * (vocab * item + token_bytes(spec, item)) + sum([*graph_sizes(rows), rows]) * table
    if tokens := piecewise_max_tokens(config):
        sizes = piecewise_sizes(tokens)
        rows = min(tokens, config.max_running_requests or tokens)
        ends = 2 * spec.num_heads * spec.head_dim * item  # queries and attention's output
        total += tokens * (token_bytes(spec, item) + ends) + sum(sizes) * spec.hidden_size * item
        total += len(sizes) * spec.num_layers * GRAPH_BYTES
        total += rows * vocab * item + (rows + MAX_CHUNKS) * table
    return total


def token_bytes(spec: ModelSpec, item: int) -> int:
    """Bytes of a token's activations in a layer, none of them freed before its end; `item`: bytes of an element."""
    attention = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    mlp = 3 * spec.intermediate_size
    if spec.moe is not None:
        mlp = max(mlp, spec.moe.top_k * (3 * spec.moe.width + spec.hidden_size))
    return (4 * spec.hidden_size + attention + mlp) * item


def kv_dtype(config: Config) -> torch.dtype:
    return FP8 if config.kv_cache_dtype == "fp8_e4m3" else TORCH_DTYPES[config.dtype]


def page_cost(config: Config, share: ModelSpec) -> int:
    """Bytes of a page on a GPU with a rank's `share`; on the CPU, whose ranks share the memory, on all ranks."""
    size = page_bytes(share, config.page_size, kv_dtype(config))
    return size * (config.tp if config.device == "cpu" else 1)


def require_pages_fit(config: Config, share: ModelSpec) -> None:
    """Raise ConfigError for a `num_pages` that is wrong whatever is free; `measure_pages` checks the rest."""
    pages, size = config.num_pages, page_cost(config, share)
    if pages is not None and pages * config.page_size < 2:
        raise ConfigError(f"--num-pages {pages} of {config.page_size} token holds no request; give more")
    if pages is not None and pages * size > (total := total_memory(torch.device(config.device))):
        page = f"a page of {config.page_size} tokens takes {size / GIB:.4f}"
        there = f"there are {total / GIB:.2f} GiB of memory in all"
        raise ConfigError(f"--num-pages {pages} needs {pages * size / GIB:.2f} GiB, and {there}; {page}")


def require_weights_fit(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, sharder: Sharder | None, fp8: bool = False
) -> None:
    """Raise ConfigError with the numbers when the weights, or what `sharder` keeps, need more than a GPU has free."""
    needed = held_elements(spec, sharder) * dtype.itemsize
    if fp8:
        needed -= held_elements(spec, sharder, QUANTIZED) * (dtype.itemsize - 1)
    if device.type == "cuda" and needed > (free := available_memory(device)):
        kind = f"{str(dtype).removeprefix('torch.')}{' and FP8' if fp8 else ''}"
        weights = f"its weights take {needed / GIB:.2f} GiB in {kind}"
        raise ConfigError(f"the model does not fit: {weights}, and {free / GIB:.2f} GiB of memory are free")


def measure_pages(config: Config, decoder: Decoder, max_seq_len: int, before: int) -> int:
    """Pages for `config`: those it asks for, or what fits. `before`: bytes available before the weights were loaded.

    Weights, activations, graphs and pages share `memory_ratio` of those. On the CPU activations are not counted; pages
    take at most what `max_running_requests` sequences of full length use and, without an explicit ratio, CPU_KV_BYTES.
    Raises ConfigError with the numbers when no page, or not the pages asked for, fit.
    """
    device, spec = torch.device(config.device), decoder.spec
    size = page_cost(config, spec)
    ratio = DEFAULT_RATIO if config.memory_ratio is None else config.memory_ratio
    taken = before - available_memory(device)
    if device.type == "cuda":
        taken += _forward_peak(config, decoder, max_seq_len)
        taken += graph_bytes(config, spec, decoder.weights.head.shape[0], TORCH_DTYPES[config.dtype], max_seq_len)
    room = int(before * ratio) - taken
    what = "weights, activations and CUDA graphs" if device.type == "cuda" else "weights"
    numbers = (
        f"{before / GIB:.2f} GiB of memory were free, of which {ratio:g} may be used (--memory-ratio), and "
        f"{what} take {taken / GIB:.2f}; a page of {config.page_size} tokens takes {size / GIB:.4f}"
    )
    if config.num_pages is not None:
        needed = config.num_pages * size
        if needed > before - taken:
            raise ConfigError(f"--num-pages {config.num_pages} needs {needed / GIB:.2f} GiB: {numbers}")
        return config.num_pages
    if device.type == "cpu":
        assert config.max_running_requests is not None
        useful = config.max_running_requests * -(-max_seq_len // config.page_size) * size
        room = min(room, useful, room if config.memory_ratio is not None else CPU_KV_BYTES)
    pages = room // size - (1 if device.type == "cuda" else 0)  # the scratch page
    if pages * config.page_size < 2:
        raise ConfigError(f"no KV page fits: {numbers}")
    return pages


def _forward_peak(config: Config, decoder: Decoder, max_seq_len: int) -> int:
    """Bytes that the largest prefill step takes, with sampling for as many rows as can end in it.

    Each row asks for everything, so the tables for penalties and biases are counted too. The step runs on scratch
    pages, so what attention over a long context takes is not counted.
    """
    assert config.max_running_requests is not None
    assert config.max_prefill_length is not None
    device, spec = torch.device(config.device), decoder.spec
    rows = min(config.max_running_requests, config.max_prefill_length)
    length = min(config.max_prefill_length // rows, max_seq_len)
    kv = allocate_kv(spec, 0, config.page_size, kv_dtype(config), device)
    runner = ModelRunner(decoder, kv, rows, max_seq_len, device)
    if max_seq_len >= WARM_UP_TOKENS:
        with _compiling(config, decoder):
            warm_up(ModelRunner(_first_and_last(decoder), kv, rows, max_seq_len, device), rows)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    present = torch.cuda.memory_allocated(device)
    runner.run(prefill_plan(rows, length, everything=True))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - present
    del runner, kv
    torch.cuda.empty_cache()
    return peak


def _first_and_last(decoder: Decoder) -> Decoder:
    """A decoder of these layers alone, whose kernels are those of all layers."""
    spec, weights, shorter = decoder.spec, decoder.weights, copy(decoder)
    kept = sorted({0, spec.num_layers - 1})
    shorter.spec = dataclasses.replace(spec, num_layers=len(kept), windows=tuple(spec.windows[i] for i in kept))
    shorter.weights = dataclasses.replace(weights, layers=[weights.layers[i] for i in kept])
    return shorter


def warm_up(runner: ModelRunner, rows: int) -> None:
    """Run a short prompt beside 1, 2, 4, … decodes on scratch pages: it compiles the kernels that `rows` may need."""
    prompt = prefill_plan(1, WARM_UP_TOKENS)
    prompt = msgspec.structs.replace(prompt, init=None, prefill_slots=prompt.prefill_slots + rows)  # the padding row
    for count in [2**power for power in range(rows.bit_length())]:
        slots = np.arange(count, dtype=np.int32)
        runner.tables.last_token.zero_()  # a kernel that was only compiled has chosen no token
        runner.run(msgspec.structs.replace(prompt, decode_slots=slots, decode_lens=np.ones_like(slots)))


def _compiling(config: Config, decoder: Decoder) -> contextlib.AbstractContextManager[None]:
    """Where a step can do without kernels: compile them, many at a time, and launch none."""
    if config.tp > 1 or not captures_prefill(decoder.attention) or find_spec("triton") is None:
        return contextlib.nullcontext()
    from minisgl.gpu.kernels.jit import compiling

    return compiling()


def prefill_plan(rows: int, length: int, everything: bool = False) -> StepPlan:
    """A step that prefills and samples `rows` prompts of `length` tokens with every filter on, on scratch pages.

    With `everything` each row also has penalties and a bias, and asks for as many log-probabilities as it can.
    """
    params = SamplingParams(top_p=0.9, min_p=0.01)
    if everything:
        params = msgspec.structs.replace(
            params, frequency_penalty=1.0, logit_bias={0: 1.0}, logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS
        )
    table = RequestTable(rows, length + 1)
    for row in range(rows):  # with a token behind the chunk, so that all of it can be scored
        request = Request.make(str(row), [0] * (length + 1), params)
        state = RequestState(request, row, 0.0, 0, length + 2, stop_ids=(0,) * MAX_STOP_TOKEN_IDS)
        table.admit(state, cached=0, step=0)
    slots, starts = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32)
    lens = np.full_like(slots, length)
    return StepPlan(
        step=0, init=table.new_rows(slots.tolist()), prefill_slots=slots, prefill_starts=starts, prefill_lens=lens,
        prefill_final=np.ones(rows, np.bool_), prefill_tokens=np.zeros(rows * length, np.int32),
        logits=table.logits_rows(slots, 0, slots, starts, lens),
    )  # fmt: skip
