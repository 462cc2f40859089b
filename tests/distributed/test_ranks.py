"""Ranks generate what one device does, whatever the architecture and the settings. Here the ranks are threads."""

import os
from unittest import mock

import pytest
import torch

from helpers.special import slow_answer, special_requests
from helpers.tp_cases import MAX_SEQ_LEN, NOWHERE, SPECS, ThreadGroup, config, generate, on_all
from minisgl.core.weights import dummy_weights
from minisgl.distributed.collectives import TPGroup, expect_close, join_group
from minisgl.distributed.executor import build_rank_executor
from minisgl.errors import EngineDeadError
from minisgl.gpu.executor import build_local_executor
from minisgl.gpu.memory import prefill_plan


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) for name in SPECS]
    + [("qwen3", 4), ("qwen3-one-kv-head", 4), ("qwen3-moe", 4), ("tiny-vocabulary", 4), ("llama-biased", 4)],
)
def test_ranks_generate_what_one_device_does(name: str, size: int) -> None:
    torch.set_num_threads(1)
    spec, plain = SPECS[name], config(overlap=False, cache="naive")
    expected = generate(build_local_executor(plain, NOWHERE, spec, MAX_SEQ_LEN), spec, plain)
    together = ThreadGroup(config(), NOWHERE, spec, MAX_SEQ_LEN, size)
    assert generate(together, spec, config(), retractions=8) == expected


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_special_requests_what_a_direct_computation_does(size: int) -> None:
    torch.set_num_threads(1)
    spec, asked = SPECS["qwen3"], special_requests(SPECS["qwen3"].vocab_size, 22)
    settings = config(num_pages=160)
    ranks = ThreadGroup(settings, NOWHERE, spec, MAX_SEQ_LEN, size)
    answers = generate(ranks, spec, settings, retractions=8, asked=asked)
    weights = dummy_weights(spec, torch.float32, torch.device("cpu"))
    for request, answer in zip(asked, answers, strict=True):
        slow_answer(spec, weights, request, MAX_SEQ_LEN).check(answer, request.params)


def test_shards_hold_each_weight_once_except_what_is_replicated() -> None:
    spec = SPECS["qwen3-moe"]

    def tensors(group: TPGroup | None) -> list[torch.Tensor]:
        if group is None:
            weights = build_local_executor(config(), NOWHERE, spec, MAX_SEQ_LEN).runner.decoder.weights
        else:
            weights = build_rank_executor(config(), NOWHERE, spec, MAX_SEQ_LEN, group)[0].runner.decoder.weights
        layers = [t for layer in weights.layers for t in vars(layer).values() if t is not None]
        return [weights.embedding, weights.head, *layers]

    whole = tensors(None)
    replicated = sum(t.numel() for t in whole if t.dim() == 1) + 6 * 32  # norms and the router
    padding = 2 * (256 - 211) * 32
    shards = sum(t.numel() for shard in on_all(2, tensors) for t in shard)
    assert shards == sum(t.numel() for t in whole) + replicated + padding


def test_gathered_logits_are_those_of_one_device() -> None:
    spec = SPECS["qwen3"]
    hidden = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    alone = build_local_executor(config(), NOWHERE, spec, MAX_SEQ_LEN).runner.decoder.logits(hidden)

    def logits(group: TPGroup) -> torch.Tensor:
        decoder = build_rank_executor(config(), NOWHERE, spec, MAX_SEQ_LEN, group)[0].runner.decoder
        return decoder.ops.gather_logits(decoder.logits(hidden))

    for found in on_all(4, logits):
        torch.testing.assert_close(found, alone)


def test_every_rank_has_the_pages_of_the_one_with_least_memory() -> None:
    with mock.patch("minisgl.gpu.executor.measure_pages", side_effect=[61, 47, 40, 54]):
        group = ThreadGroup(config(num_pages=None), NOWHERE, SPECS["qwen3"], MAX_SEQ_LEN, 4)
    assert [rank.num_pages for rank in group.ranks] == [40] * 4


def test_a_rank_that_waits_for_another_notices_that_the_group_is_broken() -> None:
    asked = iter([None, None, EngineDeadError("rank 1 is gone")])

    def alive() -> None:
        if error := next(asked):
            raise error

    group = ThreadGroup(config(), NOWHERE, SPECS["qwen3"], MAX_SEQ_LEN, 2, alive)
    first, other = group.ranks
    first.launch(prefill_plan(1, 3))  # and the other rank does not: its all-reduce waits
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        first.collect()
    other.launch(prefill_plan(1, 3))
    group.close()


@pytest.mark.parametrize("error", [0.01, 1.0, float("nan")])
def test_collectives_that_are_off_are_refused(error: float) -> None:
    right = torch.linspace(-4, 4, 32)
    wrong = right.clone()
    wrong[7] += error
    if error < 0.1:
        expect_close(wrong, right, "an all-reduce")
        return
    with pytest.raises(RuntimeError, match="an all-reduce is off by"):
        expect_close(wrong, right, "an all-reduce")


@pytest.mark.parametrize(("one_host", "given", "bound"), [(True, "", "lo"), (False, "", None), (True, "eth7", "eth7")])
def test_gloo_binds_to_loopback_by_name_on_one_host(
    monkeypatch: pytest.MonkeyPatch, one_host: bool, given: str, bound: str | None
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)  # and so it is put back at the end
    if not given:
        del os.environ["GLOO_SOCKET_IFNAME"]
    seen: list[str | None] = []

    def stop(*_: object, **__: object) -> None:
        seen.append(os.environ.get("GLOO_SOCKET_IFNAME"))
        raise InterruptedError

    monkeypatch.setattr("torch.distributed.init_process_group", stop)
    with pytest.raises(InterruptedError):
        join_group(0, 2, "file:///nowhere", torch.device("cpu"), one_host)
    assert seen == [bound]
