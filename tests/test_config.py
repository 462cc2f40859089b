"""The configuration: what is refused, what is filled in, what the environment says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from minisgl.config import Config, Launcher, Machine, cache_folder, check, from_environment, launcher, resolve
from minisgl.errors import ConfigError

CPU = Machine()
HOPPER = Machine(True, "NVIDIA H200", 140 * 2**30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp": 2, "disable_pynccl": True}, "--disable-pynccl is for tensor parallelism on GPUs: give --tp 2 or more"),
        ({"tp": 2, "all_reduce": "fused"}, "--all-reduce is for tensor parallelism on GPUs"),
        ({"attn": "fa"}, "--attn fa: fa needs a GPU; on the CPU use torch or auto"),
        ({"attn": "fa,fi"}, "--attn fa,fi: fa needs a GPU"),
        ({"attn": "torch,trtllm"}, "--attn torch,trtllm: trtllm needs a GPU"),
        ({"cuda_graph_max_bs": 256}, "--cuda-graph-max-bs 256: CUDA graphs need a GPU; leave it out or give 0"),
        ({"device": "cuda"}, "--device cuda: torch sees no CUDA GPU; use --device cpu"),
    ],
)
def test_what_only_a_gpu_can_honour_is_refused_on_the_cpu(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Config(**settings), CPU)
    assert message in error.value.message


def test_explicit_values_are_kept_and_have_no_notes() -> None:
    given: dict[str, Any] = {"device": "cpu", "attn": "torch,torch", "tp": 1, "dtype": "bfloat16", "overlap": False}
    given |= {"page_size": 256, "max_prefill_length": 16384, "memory_ratio": 0.95, "max_seq_len_override": 32768}
    given |= {"cache": "naive", "schedule_policy": "lpm", "max_running_requests": 2, "cuda_graph_max_bs": 0}
    given |= {"piecewise_cuda_graph_max_tokens": 0}
    resolved = resolve(Config(**given), CPU)
    assert resolved.config == Config(**given)
    assert resolved.notes == ()


@pytest.mark.parametrize("machine", [CPU, HOPPER])
@pytest.mark.parametrize("shell", [False, True])
def test_resolving_leaves_nothing_open_but_what_memory_and_model_decide(machine: Machine, shell: bool) -> None:
    config = resolve(Config(shell=shell), machine).config
    open_ended = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) in (None, "auto")}
    by_packages = {"attn"} if machine.has_cuda else set()
    no_limit = {"max_queued_requests", "max_queued_tokens", "request_timeout", "ssl_certfile", "ssl_keyfile"}
    measured = {"num_pages", "memory_ratio", "all_reduce"}
    assert open_ended == {"model", "max_seq_len_override"} | measured | by_packages | no_limit
    assert config.max_running_requests == (1 if shell else 256)
    assert config.max_prefill_length == (8192 if machine.has_cuda else 512)


@pytest.mark.parametrize(
    ("machine", "checkpoint", "dtype"),
    [
        (CPU, "bfloat16", "float32"),
        (HOPPER, "bfloat16", "bfloat16"),
        (HOPPER, "float16", "float16"),
        (HOPPER, "float32", "float16"),
    ],
)
def test_auto_dtype_follows_device_and_checkpoint(machine: Machine, checkpoint: str, dtype: str) -> None:
    assert resolve(Config(), machine, checkpoint).config.dtype == dtype


@pytest.mark.parametrize(
    ("settings", "gibibytes", "largest"),
    [
        *(({}, *pair) for pair in ((64, 256), (63.9, 128), (30, 128), (29.9, 64), (15, 64), (14.9, 16))),
        ({"shell": True}, 140, 1),
        ({"max_running_requests": 20}, 140, 20),
        ({"cuda_graph_max_bs": 7}, 140, 7),
        ({"cuda_graph_max_bs": 0}, 140, 0),
    ],
)
def test_the_largest_graph_follows_the_cards_memory(settings: dict[str, Any], gibibytes: float, largest: int) -> None:
    machine = Machine(True, "a card", int(gibibytes * 2**30))
    assert resolve(Config(**settings), machine).config.cuda_graph_max_bs == largest


def test_torch_attention_and_graphs_exclude_each_other_on_a_gpu() -> None:
    assert resolve(Config(attn="fa,torch"), HOPPER).config.cuda_graph_max_bs == 0
    with pytest.raises(ConfigError, match="--cuda-graph-max-bs 0"):
        resolve(Config(attn="torch", cuda_graph_max_bs=8), HOPPER)


def test_every_chosen_value_has_a_note() -> None:
    chosen = {note.partition(" = ")[0] for note in resolve(Config(), CPU).notes}
    assert chosen == {"device", "dtype", "attn", "cuda_graph_max_bs", "max_running_requests", "max_prefill_length"}


@pytest.mark.parametrize("machine", [CPU, HOPPER])
def test_resolving_is_pure_and_what_is_resolved_resolves_to_itself(machine: Machine) -> None:
    resolved = resolve(Config(), machine)
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.config.port = 1  # type: ignore[misc]
    assert resolve(Config(), machine) == resolved
    assert resolve(resolved.config, machine).config == resolved.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 257}, "--page-size must be between 1 and 256, got 257"),
        ({"num_pages": 0}, "--num-pages must be at least 1"),
        ({"max_running_requests": 0}, "--max-running-requests must be at least 1"),
        ({"max_prefill_length": -1}, "--max-prefill-length must be at least 1"),
        ({"max_seq_len_override": 0}, "--max-seq-len-override must be at least 1"),
        *(({"memory_ratio": ratio}, "--memory-ratio must be in (0, 1]") for ratio in (0.0, 1.5)),
        ({"cuda_graph_max_bs": -1}, "--cuda-graph-max-bs must be at least 0"),
        ({"port": -1}, "--port must be between 0 and 65535"),
        ({"cache": "lru"}, "--cache must be one of radix, naive"),
        *(({"api_workers": n}, f"--api-workers must be between 1 and 64, got {n}") for n in (0, 65)),
        ({"all_reduce": "symmetric"}, "--all-reduce must be one of auto, fused, nccl, got 'symmetric'"),
        *(({"attn": attn}, "--attn must be auto") for attn in ("fa,", "auto,fa")),
        ({"attn": "cudnn"}, "fa, fi, trtllm, triton, torch"),
    ],
)
def test_value_out_of_range_names_the_flag_and_the_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(Config(**settings))
    assert message in error.value.message


@pytest.mark.parametrize(
    ("name", "value", "changes"),
    [
        ("MINISGL_DISABLE_OVERLAP_SCHEDULING", "1", {"overlap": False}),
        ("MINISGL_DISABLE_OVERLAP_SCHEDULING", "0", {}),
        ("LOG_LEVEL", "DEBUG", {"log_level": "DEBUG"}),
        ("LOG_LEVEL", "warning", {"log_level": "WARNING"}),
        ("MINISGL_API_KEY", "one, two,,", {"api_key": ("one", "two")}),
        *((name, "", {}) for name in ("MINISGL_DISABLE_OVERLAP_SCHEDULING", "LOG_LEVEL", "MINISGL_API_KEY", "X")),
    ],
)
def test_environment_switches(name: str, value: str, changes: dict[str, Any]) -> None:
    assert from_environment(Config(), {name: value}) == Config(**changes)


@pytest.mark.parametrize("environ", [{"MINISGL_DISABLE_OVERLAP_SCHEDULING": "yes"}, {"LOG_LEVEL": "LOUD"}])
def test_unknown_value_of_a_switch_is_refused_by_name(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(environ))):
        from_environment(Config(), environ)


def test_ranks_need_a_card_each() -> None:
    four = dataclasses.replace(HOPPER, num_gpus=4)
    assert resolve(Config(tp=4), four).config.tp == 4
    assert resolve(Config(tp=3), CPU).config.tp == 3
    for config, machine, message in (
        (Config(tp=8), four, r"--tp 8: torch sees 4 CUDA GPUs$"),
        (Config(tp=2), HOPPER, r"--tp 2: torch sees 1 CUDA GPU$"),
        (Config(disable_pynccl=True), four, "--disable-pynccl is for tensor parallelism on GPUs"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(config, machine)


def test_the_launcher_says_which_rank_this_is() -> None:
    alone: list[dict[str, str]] = [{}, {"WORLD_SIZE": "1", "RANK": "0"}]
    assert [launcher(1, environ) for environ in alone] == [None, None]
    here = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "ten"}
    assert launcher(4, here) == Launcher(1, 4, 1, 4, "ten")
    assert Launcher(1, 4, 1, 4, "ten").listen == "127.0.0.1"
    apart = launcher(4, {**here, "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert apart == Launcher(3, 4, 1, 2, "ten")
    assert apart is not None
    assert (apart.one_host, apart.listen) == (False, "*")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', so RANK and MASTER_ADDR must be set as torchrun does: 'RANK'"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "a"}, "--tp 2: WORLD_SIZE says that there are 4 ranks"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a"}, "RANK 2, WORLD_SIZE 2"),
    ],
)
def test_what_a_launcher_says_wrongly_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        launcher(2, environ)
    assert message in error.value.message


def test_cache_folder_follows_the_users_settings() -> None:
    assert cache_folder({"MINISGL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == "/a"
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == "/b/minisgl"
    assert cache_folder({}).endswith("/.cache/minisgl")
