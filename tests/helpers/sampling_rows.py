"""Sampling parameters of some rows, and the dtypes of tests of sampling kernels."""

from typing import Any, Final

import pytest
import torch

from minisgl.core.sampler import SamplingRows

# For kernel tests that take seconds under the interpreter, where one dtype is enough for them.
# `parametrize("dtype", SLOW_DTYPES)` goes before the fixture of that name.
SLOW_DTYPES: Final = (torch.float32, *(pytest.param(t, marks=pytest.mark.gpu) for t in (torch.float16, torch.bfloat16)))


def sampling_rows(rows: int, device: torch.device | None = None, **values: Any) -> SamplingRows:
    """Each parameter a number for all rows or a list that is repeated; seeds count up unless given."""
    defaults = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "seed": range(rows), "min_len": 0}
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "min_len": torch.int32}
    columns = {}
    for name, default in defaults.items():
        column = torch.as_tensor(values.get(name, default), dtype=dtypes.get(name, torch.float32)).reshape(-1)
        columns[name] = column.repeat(rows)[:rows].to(device)
    stop_ids = torch.as_tensor(values.get("stop_ids", [[-1]] * rows), dtype=torch.int32)
    return SamplingRows(**columns, stop_ids=stop_ids.to(device))
