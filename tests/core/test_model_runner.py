import msgspec
import numpy as np
import pytest
import torch

from helpers.driver import CPU, Driver
from helpers.models import TINY_LLAMA as SPEC
from minisgl.core.executor import LocalExecutor
from minisgl.core.kv_cache import upload
from minisgl.core.plan import NewRows, StepPlan
from minisgl.core.types import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from minisgl.core.weights import dummy_weights
from minisgl.gpu.memory import prefill_plan, warm_up


def make_driver(page_size: int = 4) -> Driver:
    torch.set_num_threads(1)
    return Driver(SPEC, dummy_weights(SPEC, torch.float32, CPU), page_size=page_size)


def new_row(slot: int, temperature: float = 0.0, seed: int = 0, min_len: int = 0, stop_id: int = -1) -> NewRows:
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    sampling = {
        "temperature": one * temperature, "top_p": one, "min_p": zero, "top_k": zero.astype(np.int32),
        "seed": np.array([seed]), "min_len": np.array([min_len], np.int32),
        "stop_ids": np.full((1, MAX_STOP_TOKEN_IDS), stop_id, np.int32),
    }  # fmt: skip
    return NewRows(slots=np.array([slot], np.int32), sampling=sampling)


def test_tables_follow_the_steps() -> None:
    driver = make_driver()
    tables = driver.runner.tables
    assert driver.step(chunks={0: [1, 2, 3, 4, 5]}, unfinished=[0]) == []
    driver.step(chunks={2: [6, 7]})
    assert tables.length.tolist() == [5, 0, 2, 0, 0]
    assert int(tables.last_token[0]) == 0
    first = driver.step(decode=[2], chunks={0: [8]})
    assert tables.length.tolist() == [6, 0, 3, 0, 0]
    assert tables.last_token[[2, 0]].tolist() == first
    assert tables.page_table[0, :2].tolist() == driver.pages[0]
    assert tables.page_table[2, :1].tolist() == driver.pages[2]
    written = torch.nonzero(driver.runner.kv.k.abs().sum(dim=(0, 2, 3, 4))).flatten().tolist()
    assert written == sorted(driver.pages[0] + driver.pages[2])


def test_min_tokens_and_seed_reach_the_sampler() -> None:
    driver = make_driver()
    greedy = driver.step(chunks={0: [1, 2, 3]})[0]
    stopped = new_row(1, min_len=5, stop_id=greedy)
    assert driver.step(chunks={1: [1, 2, 3]}, init=stopped)[0] != greedy
    sampled = []
    for on, slot, seed in ((driver, 2, 5), (driver, 3, 6), (make_driver(page_size=1), 0, 5)):
        sampled += on.step(chunks={slot: [1, 2, 3]}, init=new_row(slot, temperature=3.0, seed=seed))
    assert sampled[0] == sampled[2] != sampled[1]


def test_a_row_used_again_starts_afresh() -> None:
    driver, completions = make_driver(), []
    for _ in range(2):
        driver.length[0], driver.pages[0] = 0, []
        completions.append(driver.step(chunks={0: [1, 2, 3]}) + driver.step(decode=[0]) + driver.step(decode=[0]))
    assert completions[0] == completions[1]


def test_upload_keeps_values_shapes_and_dtypes() -> None:
    arrays = {"seeds": np.array([2**63 - 1, -5]), "empty": np.empty(0, np.int32)}
    arrays |= {"table": np.arange(6, dtype=np.int32).reshape(2, 3), "odd": np.array([0.5, 1.5, 2.5], np.float32)}
    for name, tensor in upload(arrays, CPU).items():
        assert np.array_equal(tensor.numpy(), arrays[name])
        assert tensor.numpy().dtype == arrays[name].dtype


def test_the_step_that_is_measured_asks_for_everything_a_request_can() -> None:
    driver = make_driver()
    output = driver.runner.run(prefill_plan(4, 3, everything=True))
    assert output.scores is not None
    assert output.prompt_scores is not None
    assert output.scores.top_ids.shape == (4, MAX_LOGPROBS)
    assert output.prompt_scores.top_ids.shape == (12, MAX_LOGPROBS)
    processors = driver.runner.logits_processors
    assert processors.seen is not None
    assert processors.biases is not None


def test_a_warm_up_runs_a_prompt_beside_each_number_of_decodes_on_scratch_pages() -> None:
    driver = make_driver(page_size=16)
    before = driver.runner.kv.k[:, :-1].clone()
    warm_up(driver.runner, 4)
    tables = driver.runner.tables
    assert tables.length.tolist() == [2, 2, 2, 2, 16]
    assert torch.equal(driver.runner.kv.k[:, :-1], before)


def step_plan(step: int, slot: int) -> StepPlan:
    """A step that prefills and samples one row on scratch pages."""
    plan = prefill_plan(1, 3)
    return msgspec.structs.replace(plan, step=step, init=None, prefill_slots=np.array([slot], np.int32))


def test_an_executor_returns_steps_in_order_and_raises_a_steps_error_where_it_is_collected() -> None:
    executor = LocalExecutor(make_driver(page_size=16).runner)
    for step, slot in ((0, 0), (1, 0), (2, 0), (3, 99)):
        executor.launch(step_plan(step, slot))
    results = [executor.collect() for _ in range(3)]
    assert [result.step for result in results] == [0, 1, 2]
    assert all(result.tokens.dtype == np.int32 and result.tokens.shape == (1,) for result in results)
    with pytest.raises(IndexError):
        executor.collect()
    executor.close()
