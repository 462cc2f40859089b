"""The executor of one device: operations, attention backends, KV pages and CUDA graphs around core's runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minisgl.config import Config
from minisgl.core.decoder import Decoder, pack_weights
from minisgl.core.executor import LocalExecutor
from minisgl.core.kv_cache import allocate_kv
from minisgl.core.model_config import ModelSpec
from minisgl.core.model_runner import ModelRunner
from minisgl.core.ops import Operations
from minisgl.core.quantization import FP8, quantize_fp8, quantize_int8
from minisgl.core.weights import TORCH_DTYPES, Progress, Quantize, Sharder, Weights, dummy_weights, load_weights
from minisgl.errors import ConfigError
from minisgl.gpu.attention.interface import GraphBackend, captures_prefill
from minisgl.gpu.attention.select import Shape, available_backends, capability, choose, make_attention
from minisgl.gpu.cuda_graphs import DecodeGraphs, MixedGraphs, PiecewiseGraphs, piecewise_max_tokens
from minisgl.gpu.memory import available_memory, kv_dtype, measure_pages, require_pages_fit, require_weights_fit
from minisgl.gpu.operations import operations_for

FP8_CAPABILITY = 89  # the first with conversions from and to FP8
QUANTIZE: dict[str, Quantize] = {"fp8": quantize_fp8, "int8": quantize_int8}


@dataclass(frozen=True)
class RankShare:
    """What one rank of a tensor-parallel group holds and computes; `agree` makes a number the least of all ranks'."""

    spec: ModelSpec
    sharder: Sharder
    operations: Operations
    agree: Callable[[int], int]


def attention_shape(spec: ModelSpec, config: Config) -> Shape:
    fp8 = config.kv_cache_dtype == "fp8_e4m3"
    return Shape(head_dim=spec.head_dim, dtype=TORCH_DTYPES[config.dtype], page_size=config.page_size, fp8_kv=fp8)


def require_fp8(config: Config, spec: ModelSpec, gpu: int) -> None:
    """Raise ConfigError where `config` or the checkpoint needs FP8 and a GPU of this `capability` has none."""
    asked = {"--quantization fp8": config.quantization == "fp8", "--kv-cache-dtype fp8_e4m3": kv_dtype(config) == FP8}
    wanted = next((flag for flag, given in asked.items() if given), "this checkpoint" if spec.fp8 else None)
    if wanted is not None and 0 < gpu < FP8_CAPABILITY:
        raise ConfigError(f"{wanted} needs a GPU of compute capability 8.9 or higher; this one has {gpu / 10}")


def build_local_executor(
    config: Config, folder: Path, spec: ModelSpec, max_seq_len: int, progress: Progress | None = None,
    share: RankShare | None = None, alive: Callable[[], None] | None = None,
) -> LocalExecutor:  # fmt: skip
    """Load the model in `folder`, or make random weights for `config.dummy_weight`, and size the KV cache.

    `config` is resolved. On a rank of a group only its share is loaded, and every rank gets the pages that fit on all.
    Raises ModelError for weights that cannot be read, ConfigError when memory does not suffice.
    """
    device, dtype = torch.device(config.device), TORCH_DTYPES[config.dtype]
    local, sharder = (spec, None) if share is None else (share.spec, share.sharder)
    require_fp8(config, spec, capability(device))
    require_pages_fit(config, local)
    ops = operations_for(device, spec.hidden_size) if share is None else share.operations
    choose(config.attn, attention_shape(local, config), available_backends(device), capability(device))
    before = available_memory(device)
    quantize = QUANTIZE.get(config.quantization or ("fp8" if spec.fp8 else ""))
    require_weights_fit(spec, dtype, device, sharder, quantize is quantize_fp8)
    if config.dummy_weight:
        weights = dummy_weights(spec, dtype, device, sharder=sharder, quantize=quantize)
    else:
        weights = load_weights(
            folder, spec, dtype, device, progress, sharder, quantize if config.quantization else None,
            kv_scales=kv_dtype(config) == FP8,
        )  # fmt: skip
    if device.type == "cpu":
        pack_weights(weights, config.quantization == "int8")
    # These backends end with the measurement: FlashInfer's have a workspace, and `make_executor` makes its own.
    attention = make_attention(config.attn, attention_shape(local, config), device)[0]
    decoder = Decoder(local, weights, attention, max_seq_len, ops)
    num_pages = measure_pages(config, decoder, max_seq_len, before)
    del attention, decoder
    if share is not None:
        num_pages = share.agree(num_pages)
    return make_executor(local, weights, config.replace(num_pages=num_pages), max_seq_len, ops, alive)


def make_executor(
    spec: ModelSpec, weights: Weights, config: Config, max_seq_len: int, ops: Operations | None = None,
    alive: Callable[[], None] | None = None,
) -> LocalExecutor:  # fmt: skip
    """An executor over weights on `config.device`. `config` is resolved, with `num_pages`."""
    assert config.num_pages is not None
    assert config.max_running_requests is not None
    device = torch.device(config.device)
    num_pages, page_size = config.num_pages, config.page_size
    max_seq_len = min(max_seq_len, num_pages * page_size)
    kv = allocate_kv(spec, num_pages, page_size, kv_dtype(config), device)
    attention, choice = make_attention(config.attn, attention_shape(spec, config), device)
    decoder = Decoder(spec, weights, attention, max_seq_len, ops or operations_for(device, spec.hidden_size))
    runner = ModelRunner(decoder, kv, config.max_running_requests, max_seq_len, device)
    described = str(choice)
    if (rows := config.cuda_graph_max_bs) and isinstance(attention.decode, GraphBackend):
        runner.graphs.append(DecodeGraphs(decoder, kv, runner.tables, rows, max_seq_len))
    elif rows:
        described += "; its decode cannot be captured, so there are no CUDA graphs"
    if tokens := piecewise_max_tokens(config):
        if captures_prefill(attention):
            runner.graphs.append(MixedGraphs(decoder, kv, runner.tables, tokens))
        else:
            runner.forward = PiecewiseGraphs(decoder, kv, tokens).forward
    return LocalExecutor(runner, described, alive)
