"""The configuration: what is refused, what is filled in, what the environment says."""

import dataclasses
import os
import re
from typing import Any

import pytest

from minisgl.config import Config, Launcher, Machine, cache_folder, from_environment, launcher, make_config, resolve
from minisgl.errors import ConfigError

CPU = Machine()
HOPPER = Machine(True, "NVIDIA H200", 140 * 2**30)
FOUR = dataclasses.replace(HOPPER, num_gpus=4)


ON_THE_CPU: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tp": 2, "disable_pynccl": True}, "--disable-pynccl is for tensor parallelism on GPUs: give --tp 2 or more"),
    ({"tp": 2, "all_reduce": "fused"}, "--all-reduce is for tensor parallelism on GPUs"),
    ({"cuda_graph_max_bs": 256}, "--cuda-graph-max-bs 256: CUDA graphs need a GPU; leave it out or give 0"),
    ({"device": "cuda"}, "--device cuda: torch sees no CUDA GPU; use --device cpu"),
    ({"page_size": 257}, "--page-size must be between 1 and 256, got 257"),
    ({"num_pages": 0}, "--num-pages must be at least 1"),
    *(({"max_running_requests": n}, "--max-running-requests must be between 1 and 65536") for n in (0, 65537)),
    ({"max_prefill_length": -1}, "--max-prefill-length must be at least 1"),
    *(({"max_seq_len_override": n}, "--max-seq-len-override must be between 2 and 10000000") for n in (1, 10**9)),
    *(({"memory_ratio": ratio}, "--memory-ratio must be in (0, 1]") for ratio in (0.0, 1.5)),
    ({"cuda_graph_max_bs": -1}, "--cuda-graph-max-bs must be at least 0"),
    ({"port": -1}, "--port must be between 0 and 65535"),
    ({"cache": "lru"}, "--cache must be one of radix, naive"),
    *(({"api_workers": n}, f"--api-workers must be between 1 and 64, got {n}") for n in (0, 65)),
    ({"all_reduce": "symmetric"}, "--all-reduce must be one of auto, fused, nccl, got 'symmetric'"),
    *(
        ({"schedule_policy": name}, "fcfs, lpm, srpf, priority, an entry point")
        for name in ("", "sjf", "lpm.patience=5")
    ),
    (
        {"eviction": "fifo"},
        "--eviction must be one of lru, slru, an entry point of minisgl.evictions, or path.py:Class",
    ),
    ({"eviction": "slru", "cache": "naive"}, "--eviction is of the prefix cache: leave it out with --cache naive"),
    *(
        ({"client_priorities": (bad,)}, f"--client-priorities must be LOW:HIGH or N=LOW:HIGH, got {bad!r}")
        for bad in ("", "1", "9:0", "a:b", "0=0:1", "x=0:1", "1:2:3", "1.5:2", "=0:1", "0:" + "9" * 11, "0:٣")
    ),
    ({"client_priorities": ("0:1", "2=0:1"), "api_key": ("a",)}, "--client-priorities: there are 1 keys in --api-key"),
    *(({"attn": attn}, "--attn must be auto") for attn in ("fa,", "auto,fa")),
    *(
        ({name: os.fsdecode(b"/models/\xff.py")}, f"{flag} is not text in UTF-8\n")
        for name, flag in (("model", "--model"), ("schedule_policy", "--schedule-policy"), ("record", "--record"))
    ),
    ({"served_model_name": ("good", os.fsdecode(b"\xff"))}, "--served-model-name is not text in UTF-8\n"),
    ({"attn": "cudnn"}, "fa, fi, trtllm, triton, torch"),
)
REFUSED = [
    *((settings, CPU, message) for settings, message in ON_THE_CPU),
    ({"attn": "torch", "cuda_graph_max_bs": 8}, HOPPER, "--cuda-graph-max-bs 0"),
    ({"tp": 8}, FOUR, "--tp 8: torch sees 4 CUDA GPUs\n"),
    ({"tp": 2}, HOPPER, "--tp 2: torch sees 1 CUDA GPU\n"),
    ({"disable_pynccl": True}, FOUR, "--disable-pynccl is for tensor parallelism on GPUs"),
]


@pytest.mark.parametrize(("settings", "machine", "message"), REFUSED)
def test_what_is_wrong_or_not_for_this_machine_is_refused_by_name(
    settings: dict[str, Any], machine: Machine, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(Config(**settings), machine)
    assert message in f"{error.value.message}\n"


def test_only_chosen_values_have_notes() -> None:
    given: dict[str, Any] = {"device": "cpu", "attn": "torch,torch", "tp": 1, "dtype": "bfloat16", "overlap": False}
    given |= {"page_size": 256, "max_prefill_length": 16384, "memory_ratio": 0.95, "max_seq_len_override": 32768}
    given |= {"cache": "naive", "schedule_policy": "lpm", "max_running_requests": 2, "cuda_graph_max_bs": 0}
    given |= {"piecewise_cuda_graph_max_tokens": 0}
    resolved = resolve(Config(**given), CPU)
    assert resolved.config == Config(**given)
    assert not resolved.reasons
    chosen = set(resolve(Config(), CPU).reasons)
    assert chosen == {"device", "dtype", "attn", "cuda_graph_max_bs", "max_running_requests", "max_prefill_length"}


@pytest.mark.parametrize("machine", [CPU, HOPPER, FOUR])
@pytest.mark.parametrize("shell", [False, True])
def test_resolving_leaves_nothing_open_but_what_memory_and_model_decide(machine: Machine, shell: bool) -> None:
    given = Config(shell=shell, tp=machine.num_gpus if machine.has_cuda else 3)
    config = resolve(given, machine).config
    assert config.tp == given.tp
    assert resolve(config, machine).config == config == resolve(given, machine).config
    open_ended = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) in (None, "auto")}
    by_packages = {"attn"} if machine.has_cuda else set()
    no_limit = {"max_queued_requests", "max_queued_tokens", "request_timeout", "ssl_certfile", "ssl_keyfile"}
    measured = {"num_pages", "memory_ratio", "all_reduce", "max_body_size"}
    files = {"trace_steps", "record", "kv_events_config"}
    by_checkpoint = {"quantization", "kv_cache_dtype"}
    open_fields = {"model", "max_seq_len_override"} | files | measured | by_packages | by_checkpoint | no_limit
    assert open_ended == open_fields
    assert config.max_running_requests == (1 if shell else 256)
    assert config.max_prefill_length == (8192 if machine.has_cuda else 512)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_auto_dtype_follows_device_and_checkpoint() -> None:
    found = {dtype: resolve(Config(), HOPPER, dtype).config.dtype for dtype in ("bfloat16", "float16", "float32")}
    assert found == {"bfloat16": "bfloat16", "float16": "float16", "float32": "float16"}
    assert resolve(Config(), CPU, "bfloat16").config.dtype == "float32"


@pytest.mark.parametrize(
    ("settings", "gibibytes", "largest"),
    [
        *(({}, *pair) for pair in ((64, 256), (63.9, 128), (30, 128), (29.9, 64), (15, 64), (14.9, 16))),
        ({"shell": True}, 140, 1),
        ({"max_running_requests": 20}, 140, 20),
        ({"cuda_graph_max_bs": 7}, 140, 7),
        ({"cuda_graph_max_bs": 0}, 140, 0),
        ({"attn": "fa,torch"}, 140, 0),
    ],
)
def test_the_largest_graph_follows_the_gpus_memory(settings: dict[str, Any], gibibytes: float, largest: int) -> None:
    machine = Machine(True, "a GPU", int(gibibytes * 2**30))
    assert resolve(Config(**settings), machine).config.cuda_graph_max_bs == largest


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
    assert from_environment({name: value}) == Config(**changes)
    for switch, wrong in (("MINISGL_DISABLE_OVERLAP_SCHEDULING", "2"), ("LOG_LEVEL", "2"), ("MINISGL_API_KEY", " ,")):
        with pytest.raises(ConfigError, match=switch):
            from_environment({switch: wrong})


def test_a_field_that_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISGL_DISABLE_OVERLAP_SCHEDULING", "1")
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    assert make_config(overlap=True, tp=2) == Config(overlap=True, tp=2, log_level="DEBUG")
    assert make_config(log_level="ERROR") == Config(overlap=False, log_level="ERROR")


def test_the_launcher_says_which_rank_this_is_and_what_is_wrong_there_is_refused() -> None:
    alone: list[dict[str, str]] = [{}, {"WORLD_SIZE": "1", "RANK": "0"}]
    assert [launcher(1, environ) for environ in alone] == [None, None]
    here = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "ten", "MASTER_PORT": "1"}
    assert launcher(4, here) == Launcher(1, 4, 1, 4, "ten")
    assert Launcher(1, 4, 1, 4, "ten").one_host
    assert launcher(4, {**here, "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == Launcher(3, 4, 1, 2, "ten")
    assert not Launcher(3, 4, 1, 2, "ten").one_host
    wrong: tuple[tuple[dict[str, str], str], ...] = (
        ({"WORLD_SIZE": "2"}, "is '2', so RANK, MASTER_ADDR and MASTER_PORT must be set as torchrun does: 'RANK'"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a"}, "must be set as torchrun does: 'MASTER_PORT'"),
        ({**here, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (here, "--tp 2: WORLD_SIZE says that there are 4 ranks"),
        ({**here, "WORLD_SIZE": "2", "RANK": "2"}, "RANK 2, WORLD_SIZE 2"),
    )
    for environ, message in wrong:
        with pytest.raises(ConfigError, match=re.escape(message)):
            launcher(2, environ)


def test_cache_folder_follows_the_users_settings() -> None:
    assert cache_folder({"MINISGL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == "/a"
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == "/b/minisgl"
    assert cache_folder({}).endswith("/.cache/minisgl")
