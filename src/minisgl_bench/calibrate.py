"""Measures the constants of `minisgl simulate` on this machine's GPUs and writes them where the simulator finds them.

Minutes. What needs a second GPU (all-reduces), and what the host takes for a step, a launch, a request and an event, is
kept as it stands in the file of this kind of GPU, or else in the H200's. Rates of FP8 are kept in the first alone.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch

from minisgl.cli import Parser
from minisgl.core.attention import SequenceBatch
from minisgl.core.kv_cache import KVCache
from minisgl.gpu.attention.select import Shape, make_attention
from minisgl.gpu.kernels import elementwise, moe
from minisgl.gpu.operations import fused_operations
from minisgl_bench import attention, collectives, kernels
from minisgl_bench.cost_model import FOLDER, ROWS, GpuConstants, gemm_seconds, gemm_work, read_gpu
from minisgl_bench.gpu_timing import CUDA, DTYPE, HEAD_DIM, graph_us, noise, print_heading
from minisgl_bench.report import gpu_name, require_writable
from minisgl_bench.roofline import measure_peak_rates

GROUPS: Final = {2: (16, 8), 4: (32, 8), 5: (40, 8), 8: (16, 2)}  # query heads and KV heads by their ratio
LAYERS: Final = ("14B", "32B/4")  # shapes of the GEMMs that are timed in a row
LARGE: Final = (4096, 34816, 5120)  # rows, outputs, inputs
ROWS_OF_DECODES, CONTEXT, SHORT, PAGE = 256, 900, 64, 16
LONG = 16384  # rows of activations that no L2 cache holds
SHAPE: Final = Shape(head_dim=HEAD_DIM, dtype=DTYPE, page_size=PAGE)
REDUCED: Final = (1, 1024, 8192)  # rows of all-reduces


class GpuProbe:
    """Seconds of the engine's own kernels on the first GPU, inside CUDA graphs."""

    def gemm(self, rows: int, outputs: int, inputs: int) -> float:
        x, weight = noise(rows, inputs), noise(outputs, inputs)
        return 1e-6 * graph_us(partial(torch.mm, x, weight.T), calls=10, replays=50)  # 1 s: as fast as it stays

    def layer(self, model: str, rows: int) -> float:
        """Of four GEMMs and the small kernels between them."""
        ops = fused_operations(torch.device("cuda", 0))
        return 1e-6 * kernels.layer_us(kernels.make_layers(model), rows, *kernels.gemms_of(ops))

    def decode(self, heads: int, kv_heads: int, rows: int, context: int) -> tuple[float, float]:
        """Of a layer's attention, and the bytes that it reads."""
        backend = make_attention("auto", SHAPE, CUDA)[0].decode
        us, moved = attention.time_decode(backend, heads, kv_heads, rows, context, PAGE)  # type: ignore[arg-type]
        return 1e-6 * us, moved

    def prefill(self, heads: int, kv_heads: int, tokens: int) -> float:
        backend = make_attention("auto", SHAPE, CUDA)[0].prefill
        lens = np.array([tokens], np.int32)
        pages, used = attention.page_table(lens, PAGE, -(-tokens // PAGE))
        k, v = (noise(1, used + 1, PAGE, kv_heads, HEAD_DIM) for _ in range(2))
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=CUDA)
        rows = SequenceBatch(
            page_table=pages, query_lens=lens, kv_lens=lens, cu_query_lens=ends, kv_lens_device=ends[1:]
        )
        planned = backend.plan(rows, KVCache(k, v), decode=False)
        return 1e-6 * graph_us(partial(planned.run, noise(tokens, heads, HEAD_DIM), 0, 0))

    def norm(self, rows: int, hidden: int) -> float:
        x, residual, weight = noise(rows, hidden), noise(rows, hidden), noise(hidden)
        return 1e-6 * graph_us(partial(elementwise.add_rms_norm, x, residual, weight, kernels.EPS))

    def experts(self, rows: int) -> float:
        x = noise(rows, kernels.EXPERT_HIDDEN)
        return 1e-6 * graph_us(partial(moe.moe, x, *kernels.make_experts(), kernels.TOP_K, True))

    def gap(self) -> float:
        return 1e-6 * graph_us(partial(noise(1).add_, 1), calls=1, replays=500)

    def all_reduces(self) -> dict[str, Any] | None:
        """µs by name and rows, over all GPUs; None on a single one."""
        if (count := min(4, torch.cuda.device_count())) < 2:
            return None
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            collectives.main(["--tp", str(count), "--rows", *map(str, REDUCED), "--json", file.name])
            found: dict[str, Any] = json.load(file)
        return found


def solve(probe: GpuProbe, known: GpuConstants, read: float) -> GpuConstants:
    """The constants that reproduce the probe's times; `known` has those that are not measured, `read` is in bytes/s."""
    item = DTYPE.itemsize
    change = msgspec.structs.replace
    rows, outputs, inputs = LARGE
    work = 2 * gemm_work(known, -(-rows // ROWS), outputs) * inputs
    found = change(known, read=read, flops=work / probe.gemm(*LARGE), gemm_seconds=0.0)
    beside = [
        (probe.layer(model, rows) - sum(gemm_seconds(found, 1, n, k, item) for n, k in kernels.layer_shapes(model))) / 4
        for model in LAYERS
        for rows in (8, ROWS)
    ]
    gemm = max(0.0, float(np.median(beside)))
    short = min(probe.decode(*both, 1, SHORT)[0] for both in GROUPS.values())
    decodes = {group: probe.decode(*both, ROWS_OF_DECODES, CONTEXT) for group, both in GROUPS.items()}
    heads, kv_heads = GROUPS[2]
    first, last = probe.prefill(heads, kv_heads, SHORT), probe.prefill(heads, kv_heads, LARGE[0])
    flops = 2 * heads * HEAD_DIM * (LARGE[0] ** 2 - SHORT**2)  # 4 of a pair, of which half are seen
    weights = 3 * kernels.EXPERT_HIDDEN * kernels.EXPERT_WIDTH
    few, many = probe.experts(ROWS_OF_DECODES) - 2 * gemm, probe.experts(LARGE[0]) - 2 * gemm
    found = change(
        found,
        gemm_seconds=gemm,
        move=4 * LONG * LARGE[2] * item / probe.norm(LONG, LARGE[2]),
        attention_seconds=short,
        kv_read={group: moved / (seconds - short) for group, (seconds, moved) in decodes.items()},
        attention_flops=flops / (last - first),
        prefill_attention_seconds=first,
        expert_read=kernels.EXPERTS * weights * item / few,
        expert_flops=2 * LARGE[0] * kernels.TOP_K * weights / many,
        gap_seconds=probe.gap(),
    )
    if (reduced := probe.all_reduces()) is not None:
        found = change(found, **link_constants(reduced, item))
    return found


def link_constants(reduced: dict[str, Any], item: int) -> dict[str, float]:
    """From `bench collectives`: the rate and the least time of NCCL, and the least of what is fused with the norm."""
    ranks, hidden = reduced["tp"], reduced["hidden"]
    nccl = [times for name, times in reduced.items() if name.startswith("all-reduce: ") and works(times)][-1]
    fused = [times["1"] for name, times in reduced.items() if "fused" in name and isinstance(times["1"], float)]
    few, many = REDUCED[1:]
    each = 2 * (ranks - 1) / ranks * hidden * item  # bytes that a GPU sends for a row
    link: float = each * (many - few) / (nccl[str(many)] - nccl[str(few)]) * 1e6
    first: float = 1e-6 * nccl[str(few)] - each * few / link
    return {"link": link, "nccl_seconds": first, "link_seconds": 1e-6 * min(fused) if fused else first}


def works(times: dict[str, Any]) -> bool:
    """Not where a rank says why it has none."""
    return all(isinstance(us, float) for us in times.values())


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench calibrate", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to (default: the simulator's own folder)")
    options = parser.parse_args(arguments)
    path = options.json or FOLDER / f"{gpu_name().lower().partition('-')[0]}.json"
    print_heading()
    require_writable(path)
    known = read_gpu(str(path)) if path.exists() else msgspec.structs.replace(read_gpu("h200"), fp8_flops=0.0)
    name, props = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0)
    free = torch.cuda.mem_get_info()[0]
    known = msgspec.structs.replace(known, name=name, memory=free, multiprocessors=props.multi_processor_count)
    found = solve(GpuProbe(), known, measure_peak_rates(CUDA, DTYPE).read)
    source = f"measured {time.strftime('%Y-%m-%d')} by minisgl bench calibrate, torch {torch.__version__}"
    found = msgspec.structs.replace(found, source=source)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    print(path.read_text() + f"written to {path}")
    return 0
