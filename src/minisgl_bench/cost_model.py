"""What a step costs on a GPU: a roofline for each part of it, with constants that are measured for each kind of GPU.

A GEMM takes as long as reading its weights or computing, whichever is longer (Williams et al., CACM 2009). Attention of
decodes reads keys and values, that of prompts computes. All else moves activations. Each kernel has a time of its own
on top, and a step that is launched kernel by kernel is never faster than its launches.
"""

import itertools
import math
from bisect import bisect_left
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch

from minisgl.config import Config
from minisgl.core.model_config import ModelSpec
from minisgl.core.plan import StepPlan
from minisgl.core.weights import QUANTIZED, held_elements
from minisgl.distributed.shard import local_spec, sharder, vocab_shard
from minisgl.errors import ConfigError
from minisgl.gpu.cuda_graphs import graph_sizes, piecewise_max_tokens, piecewise_sizes
from minisgl.gpu.memory import DEFAULT_RATIO, graph_bytes, kv_dtype, page_cost, token_bytes
from minisgl_bench.simulated_executor import StepSeconds

FOLDER: Final = Path(__file__).parent / "gpus"
ROWS: Final = 64  # a block of rows: the smallest tile
TILES: Final = ((1, 256), (2, 128), (2, 256))  # blocks and columns of a GEMM's tile
PARTS: Final = (1, 2, 3, 4)  # of the inner dimension, in a tile of their own
RIDGE: Final = 4
FUSED_ROWS: Final = 512  # the most of an all-reduce that is fused with the norm


class GpuConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of GPU, as `minisgl bench calibrate` writes it. Rates are in bytes/s and FLOP/s, times in s."""

    name: str
    source: str  # of the figures: measured, or published
    memory: int  # bytes that a process finds free
    multiprocessors: int
    read: float  # of weights
    move: float  # of activations, bytes read and written
    flops: float  # of large GEMMs in half precision
    fp8_flops: float = 0.0  # of the same in FP8; 0: FP8 was not measured, or the GPU has none
    fp8_kv_share: float = 0.0  # of `kv_read`, for keys and values in FP8
    attention_flops: float  # of prompts
    expert_read: float  # of a mixture's weights
    expert_flops: float
    fp8_expert_share: float = 1.0  # of `expert_read`, for experts in FP8
    kv_read: dict[int, float]  # of decode attention by query heads for each KV head, interpolated between two
    gemm_seconds: float  # beside a GEMM's roofline, the small kernels behind it included
    attention_seconds: float  # beside a decode attention's reading
    prefill_attention_seconds: float  # beside the computing of a prompt's
    eager_seconds: float  # of the host to launch a layer kernel by kernel
    piece_seconds: float  # the same where steps with prompts are captured
    gap_seconds: float  # between two steps on the device
    link: float  # of an all-reduce, bytes/s that each GPU sends
    link_seconds: float  # of the smallest all-reduce, fused with the norm
    nccl_seconds: float  # of a small one through NCCL
    host_seconds: float  # to plan, launch and take in a step
    host_row_seconds: float  # of each request in it
    request_seconds: float  # of the server for a request before its engine has it, one after the other
    event_seconds: float  # from the engine to the client


def gpu_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_gpu(name: str) -> GpuConstants:
    """The constants of a GPU by name, or of a file that `minisgl bench calibrate` wrote. Raises ConfigError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name.lower()}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=GpuConstants)
    except OSError as error:
        known = ", ".join(gpu_names())
        raise ConfigError(f"--gpu {name}: {error.strerror}; known are {known}, or give a .json file") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: {error}") from error


def gemm_work(gpu: GpuConstants, blocks: int, outputs: int) -> float:
    """Outputs that the GPU computes in the time of a GEMM of `blocks` x ROWS rows: whole waves of tiles, at best.

    A tile is one multiprocessor's, and PARTS of the inner dimension can be tiles of their own.
    """
    least = math.inf
    for (tall, wide), parts in itertools.product(TILES, PARTS):
        waves = -(-blocks // tall) * -(-outputs // wide) * parts / gpu.multiprocessors
        least = min(least, math.ceil(waves) * gpu.multiprocessors * tall * ROWS * wide / parts)
    return least


def gemm_seconds(gpu: GpuConstants, blocks: int, outputs: int, inputs: int, item: int) -> float:
    """Near the ridge of the roofline neither part hides the other whole."""
    reading, computing = outputs * inputs * item / gpu.read, 2 * gemm_work(gpu, blocks, outputs) * inputs / gpu.flops
    return float((reading**RIDGE + computing**RIDGE) ** (1 / RIDGE)) + gpu.gemm_seconds


class CostModel:
    """Seconds of a step on each of `config.tp` GPUs that share the model `spec`."""

    def __init__(self, spec: ModelSpec, config: Config, gpu: GpuConstants) -> None:
        self.gpu = gpu
        self.config = config
        self.tp = config.tp
        dtype: torch.dtype = getattr(torch, config.dtype)
        self.item, kept = dtype.itemsize, kv_dtype(config).itemsize
        self.layer_gpu, self.layer_item = gpu, self.item
        if config.quantization == "fp8":
            self.layer_gpu, self.layer_item = msgspec.structs.replace(gpu, flops=gpu.fp8_flops), 1
        self.spec = share = local_spec(spec, config.tp)
        self.vocab = vocab_shard(spec.vocab_size, 0, config.tp).width
        self.windows = tuple(sorted({window for window in share.windows if window}))
        self.layers_of = {window: share.windows.count(window) for window in (0, *self.windows)}
        self.kv_bytes = 2 * share.num_kv_heads * share.head_dim * kept  # of a token in a layer
        ratio = share.num_heads / share.num_kv_heads
        self.kv_read = float(np.interp(ratio, list(gpu.kv_read), list(gpu.kv_read.values())))
        self.kv_read *= gpu.fp8_kv_share if kept == 1 else 1.0
        self.expert_read = gpu.expert_read * (gpu.fp8_expert_share if self.layer_item == 1 else 1.0)
        self.attention_flops = 4 * share.num_heads * share.head_dim  # of a query and a key
        sparse = 0 if share.moe is None else sum(share.moe.layers)
        self.sparse_layers, self.dense_layers = sparse, share.num_layers - sparse
        self.graph_sizes = graph_sizes(config.cuda_graph_max_bs) if config.cuda_graph_max_bs else []
        self.piecewise_sizes = piecewise_sizes(piecewise_max_tokens(config))
        self.rest, self.layer_gemms = cache(self._rest), cache(self._layer_gemms)
        self.head_gemm = cache(self._head_gemm)
        # Of a token in all layers: twice a norm that reads two rows and writes two, the rotary embedding, the MLP's.
        ends = 2 * (share.num_heads + 2 * share.num_kv_heads) * share.head_dim
        moved = share.num_layers * (8 * share.hidden_size + ends) + self.dense_layers * 3 * share.intermediate_size
        if share.moe is not None:
            moved += sparse * share.moe.top_k * (3 * share.moe.width + 2 * share.hidden_size)
        self.moved = moved * self.item

    def __call__(self, plan: StepPlan) -> StepSeconds:
        decodes, chunks, gpu = len(plan.decode_slots), len(plan.prefill_slots), self.gpu
        sampled = decodes + int(plan.prefill_final.sum()) if chunks else decodes
        device, launch = self.rest(plan.num_tokens, sampled, chunks > 0)
        if decodes:
            device += self.decode_attention(plan.decode_lens)
        if chunks:
            device += self.prefill_attention(plan.prefill_starts, plan.prefill_lens)
        return StepSeconds(gpu.host_seconds + gpu.host_row_seconds * (decodes + chunks), launch, device)

    def _rest(self, tokens: int, sampled: int, prompts: bool) -> tuple[float, float]:
        """A step without its attention: seconds of the device, and of the host to launch it all."""
        sizes = self.piecewise_sizes if prompts else self.graph_sizes
        in_graphs = bool(sizes) and tokens <= sizes[-1]
        rows = sizes[bisect_left(sizes, tokens)] if in_graphs else tokens  # graphs pad
        layer = self.gpu.piece_seconds if in_graphs else self.gpu.eager_seconds
        seconds = self.gpu.gap_seconds + self.layers_seconds(rows) + self.head_seconds(sampled)
        return seconds, layer * self.spec.num_layers if prompts or not in_graphs else 0.0

    def _gemm(self, blocks: int, outputs: int, inputs: int) -> float:
        return gemm_seconds(self.layer_gpu, blocks, outputs, inputs, self.layer_item)

    def _head_gemm(self, blocks: int) -> float:
        return gemm_seconds(self.gpu, blocks, self.vocab, self.spec.hidden_size, self.item)

    def _layer_gemms(self, blocks: int) -> float:
        """The GEMMs of all layers, without experts."""
        spec, hidden, width = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        queries, both = spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim
        seconds = (self._gemm(blocks, queries + both, hidden) + self._gemm(blocks, hidden, queries)) * spec.num_layers
        if self.dense_layers:
            mlp = self._gemm(blocks, 2 * width, hidden) + self._gemm(blocks, hidden, width)
            seconds += mlp * self.dense_layers
        return seconds

    def _experts(self, rows: int) -> float:
        """Both GEMMs of the experts that so many rows meet if their choices are spread evenly."""
        moe = self.spec.moe
        if moe is None:
            return 0.0
        met = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** rows)
        weights = 3 * self.spec.hidden_size * moe.width
        reading = met * weights * self.layer_item / self.expert_read
        computing = 2 * rows * moe.top_k * weights / self.gpu.expert_flops
        return self.sparse_layers * (max(reading, computing) + 2 * self.gpu.gemm_seconds)

    def _all_reduce(self, rows: int) -> float:
        if self.tp == 1:
            return 0.0
        fused = rows <= FUSED_ROWS and self.config.all_reduce != "nccl"
        sent = 2 * (self.tp - 1) / self.tp * rows * self.spec.hidden_size * self.item
        return (self.gpu.link_seconds if fused else self.gpu.nccl_seconds) + sent / self.gpu.link

    def layers_seconds(self, rows: int) -> float:
        """All layers but their attention, for so many tokens."""
        seconds = self.layer_gemms(-(-rows // ROWS)) + self._experts(rows) + rows * self.moved / self.gpu.move
        return seconds + 2 * self.spec.num_layers * self._all_reduce(rows)

    def head_seconds(self, rows: int) -> float:
        """Logits and a token for so many rows, whose logits all ranks gather; none where no prompt ends."""
        if not rows:
            return 0.0
        logits = rows * self.vocab * self.item  # of a rank
        seconds = self.head_gemm(-(-rows // ROWS))
        seconds += (1 + self.tp) * logits / self.gpu.move
        if self.tp > 1:
            seconds += self.gpu.nccl_seconds + (self.tp - 1) * logits / self.gpu.link
        return seconds

    def decode_attention(self, lengths: np.ndarray) -> float:
        tokens: int = sum(lengths.tolist()) + len(lengths)  # faster than numpy up to 100 rows
        seen = self.layers_of[0] * tokens
        for window in self.windows:
            seen += self.layers_of[window] * int(np.minimum(lengths + 1, window).sum())
        return seen * self.kv_bytes / self.kv_read + self.spec.num_layers * self.gpu.attention_seconds

    def prefill_attention(self, starts: np.ndarray, lengths: np.ndarray) -> float:
        starts, lengths = starts.astype(np.float64), lengths.astype(np.float64)
        ends = starts + lengths
        # each query sees all before it and itself; the keys and values of a chunk are read at least once
        seen, read = self.layers_of[0] * float((ends * (ends + 1) - starts * (starts + 1)).sum()) / 2, float(ends.sum())
        for window in self.windows:
            inside = np.minimum(ends, window)
            first = np.minimum(starts, window)
            growing = (inside * (inside + 1) - first * (first + 1)) / 2
            seen += self.layers_of[window] * float((growing + (lengths - (inside - first)) * window).sum())
        computing = seen * self.attention_flops / self.gpu.attention_flops
        reading = self.spec.num_layers * read * self.kv_bytes / self.gpu.read
        return max(computing, reading) + self.spec.num_layers * self.gpu.prefill_attention_seconds


def pages_that_fit(spec: ModelSpec, config: Config, gpu: GpuConstants, max_seq_len: int) -> int:
    """KV pages beside weights, CUDA graphs and the largest step's activations. Raises ConfigError if none fits."""
    assert config.max_prefill_length is not None
    assert config.max_running_requests is not None
    dtype: torch.dtype = getattr(torch, config.dtype)
    share, vocab = local_spec(spec, config.tp), vocab_shard(spec.vocab_size, 0, config.tp).width
    shards = sharder(spec, 0, config.tp) if config.tp > 1 else None
    weights = held_elements(spec, shards) * dtype.itemsize
    if config.quantization == "fp8":
        weights -= held_elements(spec, shards, QUANTIZED) * (dtype.itemsize - 1)
    # logits of all rows in float32 a few times, when each asks for log-probabilities
    logits = 6 * config.max_running_requests * spec.vocab_size * 4
    activations = config.max_prefill_length * token_bytes(share, dtype.itemsize) + logits
    graphs = graph_bytes(config, share, vocab, dtype, max_seq_len)
    ratio = DEFAULT_RATIO if config.memory_ratio is None else config.memory_ratio
    room, size = ratio * gpu.memory - weights - activations - graphs, page_cost(config, share)
    if room < 2 * size:
        needed = (weights + activations + graphs) / 2**30
        raise ConfigError(f"{gpu.name}: weights, activations and graphs take {needed:.1f} GiB, so no KV page fits")
    return int(room // size)
