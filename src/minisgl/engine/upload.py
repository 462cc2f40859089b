"""Host arrays to the device, all of a step's in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 8


def upload(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the same names, dtypes and shapes on the device. On the CPU they share the arrays' memory.

    Elsewhere one copy from pinned memory carries them all, and the host does not wait for it.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sizes = (-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays.values())
    starts = list(accumulate(sizes, initial=0))
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    host = packed.numpy()
    for array, start in zip(arrays.values(), starts, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for (name, array), start in zip(arrays.items(), starts, strict=False)
    }
