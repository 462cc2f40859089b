"""The bundled model on the GPU against float32 on the CPU: 20 prompts, every position along the CPU's own answer.

`MINISGL_TEST_MODEL` names its GGUF file, or a folder with the converted model, where the package is not installed.
The limits are about 1.5 times what was measured, and `--record` writes down what is: half precision does not hold
log-probabilities to 1e-2, float32 does.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.bundled import bundled_prompts
from helpers.driver import CPU, Driver
from helpers.gpu import DEVICE, fused_driver, gpu_config, graph_driver
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.weights import TORCH_DTYPES, load_weights
from minisgl.errors import ModelError
from minisgl.formats.hub import locate_model

pytestmark = pytest.mark.gpu

LENGTH, LIMIT, MARGIN = 40, 256, 0.05
# The largest difference in the log-probability of any token of the answers, and that of 99 in a hundred.
LIMITS = {"float32": (1e-3, 1e-3), "float16": (3e-2, 2e-2), "bfloat16": (3e-1, 1.8e-1)}
# By how much the best logit must lead for its token to be certain; bfloat16 keeps a logit of 20 to within 0.06.
MARGINS = {"float32": MARGIN, "float16": MARGIN, "bfloat16": 0.3}
BACKENDS = {"float32": "triton", "float16": "auto", "bfloat16": "auto"}
Record = Callable[[str, object], None]


@functools.cache
def folder() -> Path:
    try:
        return locate_model(os.environ.get("MINISGL_TEST_MODEL"))
    except ModelError as error:
        pytest.skip(f"MINISGL_TEST_MODEL names no model, and {error}")


@functools.cache
def reference() -> tuple[ModelSpec, list[list[int]], list[list[int]], Tensor]:
    """The model, 20 prompts, their greedy answers in float32 on the CPU, and log-probabilities (20, LENGTH, V)."""
    spec = read_spec(folder())
    prompts = bundled_prompts(folder())
    weights = load_weights(folder(), spec, torch.float32, CPU)
    driver = Driver(spec, weights, rows=len(prompts), page_size=16, num_pages=400, max_seq_len=LIMIT)
    answers = [[token] for token in driver.step(chunks=dict(enumerate(prompts)))]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    logits = [driver.logits[ends]]
    for _ in range(LENGTH - 1):
        for answer, token in zip(answers, driver.step(decode=range(len(prompts))), strict=True):
            answer.append(token)
        logits.append(driver.logits)
    return spec, prompts, answers, torch.stack(logits, dim=1).log_softmax(dim=-1)


def follow(driver: Driver, prompts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Decode along given answers: the tokens it would have said (20, LENGTH), and each step's recorded logits."""
    rows = range(len(prompts))
    said = [driver.step(chunks=dict(enumerate(prompts)))]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    recording = hasattr(driver.decoder, "last")  # not where the runner is the engine's own
    logits = [driver.logits[ends.to(DEVICE)].float().cpu()] if recording else []
    for column in zip(*[answer[:-1] for answer in answers], strict=True):
        driver.runner.tables.last_token[: len(rows)] = torch.tensor(column, dtype=torch.int32, device=DEVICE)
        said.append(driver.step(decode=rows))
        if recording:
            logits.append(driver.logits.float().cpu())
    return torch.tensor(said).T, logits


def judge(said: Tensor, exact: Tensor, margin: float, label: str, record: Record) -> None:
    """Require the reference's token wherever it leads by more than `margin`; record how far doubt really reaches."""
    best = exact.topk(2, dim=-1)
    lead = best.values[..., 0] - best.values[..., 1]
    differs = said != best.indices[..., 0]
    sure, largest = lead > MARGIN, float(lead[differs].max()) if differs.any() else 0.0
    record(f"{label}tokens, and those that differ", (said.numel(), int(differs.sum())))
    record(f"{label}the same where float32 leads by {MARGIN}", (int(sure.sum()), int((differs & sure).sum())))
    record(f"{label}largest lead of a token that differs", round(largest, 4))
    assert not (differs & (lead > margin)).any()


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_log_probabilities_and_tokens_are_those_of_float32_on_the_cpu(dtype: str, record_property: Record) -> None:
    spec, prompts, answers, exact = reference()
    weights = load_weights(folder(), spec, TORCH_DTYPES[dtype], DEVICE)
    config = gpu_config(dtype=dtype, attn=BACKENDS[dtype], max_running_requests=20, num_pages=400)
    graphs = graph_driver(spec, weights, config.replace(cuda_graph_max_bs=20), LIMIT)
    judge(follow(graphs, prompts, answers)[0], exact, MARGINS[dtype], "graphs: ", record_property)
    said, logits = follow(fused_driver(spec, weights, config, LIMIT), prompts, answers)
    ours = torch.stack(logits, dim=1).log_softmax(dim=-1)
    chosen = torch.tensor(answers).unsqueeze(-1)
    error = (ours.gather(-1, chosen) - exact.gather(-1, chosen)).abs().flatten()
    record_property("largest difference of a log-probability", round(float(error.max()), 5))
    record_property("99th percentile", round(float(error.quantile(0.99)), 5))
    record_property("mean", round(float(error.mean()), 5))
    judge(said, exact, MARGINS[dtype], "", record_property)
    largest, usual = LIMITS[dtype]
    assert float(error.max()) <= largest
    assert float(error.quantile(0.99)) <= usual
