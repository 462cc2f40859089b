"""Matrix products with weights that are prepared once for the device that reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TYPICAL_ROWS = 8
"""Rows of the activation that a packed weight is laid out for; layouts differ little from 2 to 512."""

EXACT_ROWS, ROW_STEP = 64, 16
"""Above so many rows a packed product gets a multiple of the step, by rows of zeros.

oneDNN compiles and keeps a program for each number of rows, some 2 MB for the five shapes of a small model: with every
number up to a prefill budget of 512 that came to 1 GB.
"""


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by this weight faster from a layout of its own than from rows.

    Measured on two cores of a Zen 4 (float32, SmolLM2-135M's matrices): 21 ms against 43 for one row, 21 against 52
    for 8, 640 against 740 for 512.
    """
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.dim() == 2
        and not weight.is_mkldnn
        and torch._C._has_mkldnn
    )


def pack(weight: Tensor) -> Tensor:
    """The weight (out, in) as `linear` reads it fastest: packed where `can_pack`, else itself.

    A packed weight keeps its shape, is good for `linear` only, and may round sums differently.
    """
    if not can_pack(weight):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, in) times a weight (out, in), packed or not, plus bias (out,) -> (T, out)."""
    if weight.is_mkldnn:
        rows = x.shape[0]
        if lacking := -rows % ROW_STEP if rows > EXACT_ROWS else 0:
            x = F.pad(x, (0, 0, 0, lacking))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product[:rows]
    return F.linear(x, weight, bias)


def linear_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same, written to out (T, out)."""
    if weight.is_mkldnn:
        out.copy_(linear(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
