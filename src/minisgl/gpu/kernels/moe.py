"""A mixture-of-experts layer in four launches after the router's GEMM, without a host sync. Twin: `core.ops.moe`.

Routing writes, for each expert, the list of (token, choice) pairs that chose it. Two grouped GEMMs follow: a thread
block takes a block of one expert's list and a tile of its outputs. Only the device knows which blocks exist, so the
grid has as many as the shapes allow. The last launch sums each token's choices. The order of a list depends on timing,
but the result does not: rows of a GEMM do not mix, and the sums run over a token's choices in order. Before a GEMM with
weights in FP8 one more launch quantises its rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

from minisgl.core.quantization import BLOCK, Fp8Weight
from minisgl.gpu.kernels.elementwise import gated, quantize_rows
from minisgl.gpu.kernels.jit import cdiv, jit, jit_varying, next_power_of_2, warps_for

ROUTED = 8  # tokens per thread block of the routing
SUM_BLOCK = 1024


class MoeTile(NamedTuple):
    rows: int  # outputs of a thread block: rows x columns
    gate_up_columns: int  # of each of gate and up
    down_columns: int
    inner: int  # elements of the sum at a time
    warps: int
    stages: int


MOE_TILES = (
    MoeTile(rows=16, gate_up_columns=32, down_columns=64, inner=128, warps=4, stages=4),
    MoeTile(rows=32, gate_up_columns=32, down_columns=64, inner=128, warps=4, stages=4),
    MoeTile(rows=64, gate_up_columns=64, down_columns=128, inner=64, warps=4, stages=4),
    MoeTile(rows=128, gate_up_columns=64, down_columns=128, inner=64, warps=8, stages=4),
)


def moe_tile_for(pairs: int, experts: int) -> MoeTile:
    """The smallest tile that holds one and a half times an expert's mean list, or the largest."""
    return next((tile for tile in MOE_TILES if 2 * tile.rows * experts >= 3 * pairs), MOE_TILES[-1])


@jit_varying("tokens")
def _route_kernel(
    logits: tensor, weights: tensor, lists: tensor, counts: tensor, tokens: tensor, EXPERTS: constexpr,
    BLOCK_EXPERTS: constexpr, TOP_K: constexpr, BLOCK_K: constexpr, NORMALISE: constexpr, ROWS: constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    expert = tl.arange(0, BLOCK_EXPERTS)[None, :]
    x = tl.load(logits + token * EXPERTS + expert, mask=(token < tokens) & (expert < EXPERTS), other=0.0).to(tl.float32)
    x = tl.where(expert < EXPERTS, tl.where(x == x, x, 0.0), float("-inf"))  # a NaN would choose one expert twice
    x = tl.exp(x - tl.max(x, axis=1)[:, None])
    probs = x / tl.sum(x, axis=1)[:, None]
    choice = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((ROWS, BLOCK_K), tl.int32)
    weight = tl.zeros((ROWS, BLOCK_K), tl.float32)
    left = tl.where(expert < EXPERTS, probs, -1.0)
    for index in range(TOP_K):
        best, where = tl.max(left, axis=1, return_indices=True)
        chosen = tl.where(choice == index, where[:, None], chosen)
        weight = tl.where(choice == index, best[:, None], weight)
        left = tl.where(expert == where[:, None], -1.0, left)
    if NORMALISE:
        weight = weight / tl.sum(weight, axis=1)[:, None]
    pair = token * TOP_K + choice
    mask = (token < tokens) & (choice < TOP_K)
    tl.store(weights + pair, weight.to(weights.dtype.element_ty), mask=mask)
    rank = tl.atomic_add(counts + chosen, 1, mask=mask, sem="relaxed")
    tl.store(lists + chosen.to(tl.int64) * tokens + rank, pair, mask=mask)


@jit
def _block_rows(
    counts: tensor, lists: tensor, tokens: tensor, EXPERTS: constexpr, BLOCK_EXPERTS: constexpr, ROWS: constexpr
) -> tensor:
    """This thread block's expert (EXPERTS if there is none), the pairs in its block, and which of those are real."""
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_EXPERTS)
    count = tl.load(counts + expert, mask=expert < EXPERTS, other=0)
    blocks = (count + ROWS - 1) // ROWS
    ends = tl.cumsum(blocks, axis=0)
    own = tl.sum(((ends <= block) & (expert < EXPERTS)).to(tl.int32), axis=0)
    first = tl.sum(tl.where(expert == own, ends - blocks, 0), axis=0)
    rank = (block - first) * ROWS + tl.arange(0, ROWS)
    real = rank < tl.sum(tl.where(expert == own, count, 0), axis=0)
    pair = tl.load(lists + own.to(tl.int64) * tokens + rank, mask=real, other=0)
    return own, pair, real


@jit
def _column_scales(
    scale: tensor, expert: tensor, column: tensor, columns: tensor, groups: tensor, SHARING: constexpr
) -> tensor:
    """Where the scales of an expert's output columns begin: `groups` for each SHARING of them."""
    if SHARING:
        scale += (expert.to(tl.int64) * tl.cdiv(columns, SHARING) + column // SHARING) * groups
    return scale


@jit
def _add_product(
    total: tensor, rows: tensor, columns: tensor, row_scale: tensor, column_scale: tensor, padded: tensor,
    start: tensor, SHARING: constexpr,
) -> tensor:  # fmt: skip
    if SHARING > 1:  # of the sum's elements, too, as many share a scale
        group = start // SHARING
        total += _scaled(tl.dot(rows, columns), row_scale + group * padded, column_scale + group)
    else:
        total = tl.dot(rows, columns, total, input_precision="ieee")
    return total


@jit
def _scaled(product: tensor, row_scale: tensor, column_scale: tensor) -> tensor:
    return product * tl.load(row_scale)[:, None] * tl.load(column_scale)[None, :]


@jit_varying("tokens", "padded")
def _gate_up_kernel(
    x: tensor, x_scale: tensor, padded: tensor, weight: tensor, scale: tensor, groups: tensor, lists: tensor,
    counts: tensor, hidden: tensor, tokens: tensor, dim: tensor, width: tensor, TOP_K: constexpr, EXPERTS: constexpr,
    BLOCK_EXPERTS: constexpr, ROWS: constexpr, COLUMNS: constexpr, INNER: constexpr, SHARING: constexpr,
) -> None:  # fmt: skip
    expert, pair, real = _block_rows(counts, lists, tokens, EXPERTS, BLOCK_EXPERTS, ROWS)
    if expert < EXPERTS:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.arange(0, INNER)
        source = x + (pair // TOP_K).to(tl.int64)[:, None] * dim + inner[None, :]
        x_scales, held = x_scale + pair // TOP_K, tl.minimum(column, width - 1)
        gate_scales = _column_scales(scale, expert, held, 2 * width, groups, SHARING)
        up_scales = _column_scales(scale, expert, width + held, 2 * width, groups, SHARING)
        gates = weight + expert.to(tl.int64) * 2 * width * dim + column[None, :] * dim + inner[:, None]
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, dim, INNER):
            within = inner < dim - start
            mask = within[:, None] & (column < width)[None, :]
            rows = tl.load(source + start, mask=real[:, None] & within[None, :], other=0.0)
            columns = tl.load(gates + start, mask=mask, other=0.0)
            gate = _add_product(gate, rows, columns, x_scales, gate_scales, padded, start, SHARING)
            columns = tl.load(gates + width * dim + start, mask=mask, other=0.0)
            up = _add_product(up, rows, columns, x_scales, up_scales, padded, start, SHARING)
        if SHARING == 1:
            gate, up = _scaled(gate, x_scales, gate_scales), _scaled(up, x_scales, up_scales)
        target = hidden + pair.to(tl.int64)[:, None] * width + column[None, :]
        dtype = hidden.dtype.element_ty
        tl.store(target, gated(gate.to(dtype), up.to(dtype)), mask=real[:, None] & (column < width)[None, :])


@jit_varying("tokens", "padded")
def _down_kernel(
    hidden: tensor, hidden_scale: tensor, padded: tensor, weight: tensor, scale: tensor, groups: tensor, shares: tensor,
    lists: tensor, counts: tensor, parts: tensor, tokens: tensor, dim: tensor, width: tensor, EXPERTS: constexpr,
    BLOCK_EXPERTS: constexpr, ROWS: constexpr, COLUMNS: constexpr, INNER: constexpr, SHARING: constexpr,
) -> None:  # fmt: skip
    expert, pair, real = _block_rows(counts, lists, tokens, EXPERTS, BLOCK_EXPERTS, ROWS)
    if expert < EXPERTS:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inner = tl.arange(0, INNER)
        source = hidden + pair.to(tl.int64)[:, None] * width + inner[None, :]
        scales = _column_scales(scale, expert, tl.minimum(column, dim - 1), dim, groups, SHARING)
        downs = weight + expert.to(tl.int64) * dim * width + column[None, :] * width + inner[:, None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width, INNER):
            within = inner < width - start
            rows = tl.load(source + start, mask=real[:, None] & within[None, :], other=0.0)
            columns = tl.load(downs + start, mask=within[:, None] & (column < dim)[None, :], other=0.0)
            total = _add_product(total, rows, columns, hidden_scale + pair, scales, padded, start, SHARING)
        if SHARING == 1:
            total = _scaled(total, hidden_scale + pair, scales)
        dtype = parts.dtype.element_ty
        share = tl.load(shares + pair, mask=real, other=0.0).to(tl.float32)[:, None]
        part = (total.to(dtype).to(tl.float32) * share).to(dtype)
        target = parts + pair.to(tl.int64)[:, None] * dim + column[None, :]
        tl.store(target, part, mask=real[:, None] & (column < dim)[None, :])


@jit
def _sum_kernel(parts: tensor, out: tensor, dim: tensor, TOP_K: constexpr, BLOCK: constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        part = tl.load(parts + (token * TOP_K + choice) * dim + column, mask=column < dim, other=0.0)
        total += part.to(tl.float32)
    tl.store(out + token * dim + column, total.to(out.dtype.element_ty), mask=column < dim)


def _operands(
    x: Tensor, weight: Tensor | Fp8Weight, tile: MoeTile, columns: int
) -> tuple[tuple[Tensor | int, ...], dict[str, Any]]:
    """The first arguments of a GEMM's kernel, for which x is quantised as the weight is, and its options."""
    options = {"ROWS": tile.rows, "COLUMNS": columns, "num_warps": tile.warps}
    if isinstance(weight, Tensor):
        stages = tile.stages if x.element_size() == 2 else 2  # what fits in shared memory
        return (x, x, 0, weight, weight, 0), {**options, "INNER": tile.inner, "SHARING": 0, "num_stages": stages}
    rows, sharing = quantize_rows(x, weight.blocks), BLOCK if weight.blocks else 1
    operands = (rows.data, rows.scale, len(rows.data), weight.data, weight.scale, weight.scale.shape[-1])
    return operands, {**options, "INNER": BLOCK, "SHARING": sharing, "num_stages": tile.stages}


def moe(
    x: Tensor, router: Tensor, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, top_k: int, norm_topk_prob: bool
) -> Tensor:
    """x (T, D), router (E, D), gate_up (E, 2I, D), down (E, D, I), all contiguous -> (T, D).

    The sum over a token's experts is in float32 and rounded once.
    """
    assert all(operand.data.is_contiguous() for operand in (x, gate_up, down))
    (tokens, dim), (experts, _, width), device = x.shape, down.shape, x.device
    pairs = tokens * top_k
    out = torch.empty_like(x)
    if not tokens:
        return out
    logits = F.linear(x, router)
    shares = torch.empty(pairs, dtype=x.dtype, device=device)
    lists = torch.empty((experts, tokens), dtype=torch.int32, device=device)
    counts = torch.zeros(experts, dtype=torch.int32, device=device)
    hidden = torch.empty((pairs, width), dtype=x.dtype, device=device)
    parts = torch.empty((pairs, dim), dtype=x.dtype, device=device)
    tile = moe_tile_for(pairs, experts)
    blocks = (pairs + min(experts, pairs) * (tile.rows - 1)) // tile.rows
    sizes = {"EXPERTS": experts, "BLOCK_EXPERTS": next_power_of_2(experts)}
    _route_kernel[(cdiv(tokens, ROUTED),)](
        logits, shares, lists, counts, tokens, TOP_K=top_k, BLOCK_K=next_power_of_2(top_k),
        NORMALISE=norm_topk_prob, ROWS=ROUTED, **sizes,
    )  # fmt: skip
    operands, options = _operands(x, gate_up, tile, tile.gate_up_columns)
    _gate_up_kernel[(blocks, cdiv(width, tile.gate_up_columns))](
        *operands, lists, counts, hidden, tokens, dim, width, TOP_K=top_k, **sizes, **options
    )
    operands, options = _operands(hidden, down, tile, tile.down_columns)
    _down_kernel[(blocks, cdiv(dim, tile.down_columns))](
        *operands, shares, lists, counts, parts, tokens, dim, width, **sizes, **options
    )
    block = min(SUM_BLOCK, next_power_of_2(dim))
    _sum_kernel[(tokens, cdiv(dim, block))](parts, out, dim, TOP_K=top_k, BLOCK=block, num_warps=warps_for(block))
    return out
