"""From a configuration to a running engine: find the model, resolve what was left open, load, size the cache."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from operator import call
from pathlib import Path
from typing import Any, TypeVar

import torch

from minisgl.config import BUNDLED_MODEL, Config, Launcher, Machine, Resolved, launcher, resolve
from minisgl.core.engine import Engine, Observer
from minisgl.core.executor import LocalExecutor
from minisgl.core.model_config import ModelSpec, optional_fields, read_spec
from minisgl.core.types import ModelInfo
from minisgl.distributed.executor import GroupExecutor, build_group_executor
from minisgl.errors import ConfigError
from minisgl.formats.hub import locate_model, progress_bar
from minisgl.gpu.executor import build_local_executor
from minisgl.plugins import WorkThread, load_policies
from minisgl.text.grammar_check import GrammarCompiler
from minisgl.trace import TraceWriter, TrafficRecorder

Executor = LocalExecutor | GroupExecutor
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Built:
    engine: Engine
    folder: Path  # with its tokenizer
    notes: tuple[str, ...]  # a line for each value of the effective configuration


def build_engine(config: Config, progress: bool = False, on_failure: Callable[[], None] | None = None) -> Built:
    """Load the model that `config` names. Raises ConfigError or ModelError with what to change.

    `on_failure` is called from another thread when one of several ranks is gone. A process that torchrun started as
    another rank than 0 stays here until rank 0 is done, and ends.
    """
    launched = launcher(config.tp)
    if launched is not None and launched.rank > 0:
        from minisgl.distributed.worker import serve_rank

        sys.exit(serve_rank(launched))
    machine = probe_machine(launched)
    policies = load_policies(config)  # what is wrong with one is said before the model loads
    observers: list[Observer] = []
    if config.trace_steps is not None:
        observers.append(TraceWriter(config.trace_steps))
    if config.record is not None:
        observers.append(TrafficRecorder(config.record))
    early = resolve(config, machine).config  # the dtype, of a checkpoint that is converted, is final with the model
    run = in_passing_thread if early.device == "cpu" else call
    weights = not config.dummy_weight
    folder = run(partial(locate_model, config.model, config.model_source, early.dtype, weights, progress))
    spec = read_spec(folder)
    eos = read_eos_token_ids(folder, spec.vocab_size)
    resolved = resolve(config, machine, spec.checkpoint_dtype)
    wanted = max_seq_len(resolved.config, spec)
    executor: Executor
    with progress_bar("Loading weights", enabled=progress) as advance:
        if config.tp == 1:
            executor = run(partial(build_local_executor, resolved.config, folder, spec, wanted, advance))
        else:
            executor = build_group_executor(resolved.config, folder, spec, wanted, advance, launched, on_failure)
    bundled = config.model is None or config.model == BUNDLED_MODEL
    model = ModelInfo(
        name="SmolLM2-135M-Instruct" if bundled else config.model or "",
        vocab_size=spec.vocab_size,
        max_seq_len=min(wanted, executor.num_pages * config.page_size),
        eos_token_ids=eos,
    )
    grammars = GrammarCompiler(folder, model.vocab_size, model.eos_token_ids)
    engine = Engine(executor, model, resolved.config, grammars.constraint, policies=policies)
    engine.observers += observers
    return Built(engine, folder, describe(resolved, spec, executor, model.max_seq_len))


def read_eos_token_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """EOS ids in the vocabulary: of generation_config.json, config.json, then the tokenizer's `eos_token`."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        fields = optional_fields(folder / name)
        found: Any = fields.values.get("eos_token_id")
        found = [] if found is None else found if isinstance(found, list) else [found]
        if any(type(token) is not int or token < 0 for token in found):
            raise fields.error("eos_token_id", "a token id or a list of them")
        ids += found
    if (token := tokenizer_eos_id(folder)) is not None:
        ids.append(token)
    return tuple(dict.fromkeys(token for token in ids if token < vocab_size))


def tokenizer_eos_id(folder: Path) -> int | None:
    config = optional_fields(folder / "tokenizer_config.json")
    text: Any = config.values.get("eos_token")
    text = text.get("content") if isinstance(text, dict) else text
    if text is None:
        return None
    if not isinstance(text, str):
        raise config.error("eos_token", "a string or an object with content")
    for key, added in config.section("added_tokens_decoder", {}).values.items():
        if key.isdecimal() and isinstance(added, dict) and added.get("content") == text:
            return int(key)
    tokenizer = optional_fields(folder / "tokenizer.json")
    for added in tokenizer.items("added_tokens", dict, []):
        if added.get("content") == text and type(added.get("id")) is int:
            return int(added["id"])
    vocab = tokenizer.section("model", {}).values.get("vocab")
    found = vocab.get(text) if isinstance(vocab, dict) else None
    return found if type(found) is int else None


def in_passing_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, done in a thread that is gone then.

    A thread that computed on a CPU keeps libgomp's threads. When these are more than the processors, all sleep while
    they wait, and the parallel loops of each step, which another thread computes, take longer by waking them.
    """
    thread = WorkThread(work)
    try:
        thread.start()
        return thread.done.result()
    except BaseException as error:
        if not thread.done.done():  # an interrupt, which is to stop the work too
            thread.stop(type(error))
        raise
    finally:
        if thread.ident is not None:
            thread.join()


def probe_machine(launched: Launcher | None = None) -> Machine:
    """What there is to run on. Raises ConfigError when this host has no GPU for a rank that torchrun started."""
    if not torch.cuda.is_available():
        return Machine()
    here = torch.cuda.device_count()
    if launched is not None and launched.local_rank >= here:
        raise ConfigError(f"LOCAL_RANK is {launched.local_rank}: torch sees {here} CUDA GPUs here")
    memory = torch.cuda.get_device_properties(0).total_memory
    return Machine(True, torch.cuda.get_device_name(0), memory, here if launched is None else launched.size)


def max_seq_len(config: Config, spec: ModelSpec) -> int:
    return config.max_seq_len_override or spec.max_position


def describe(resolved: Resolved, spec: ModelSpec, executor: Executor, fits: int) -> tuple[str, ...]:
    config, num_pages = resolved.config, executor.num_pages
    reasons = {"attn": executor.attention_choice, **resolved.reasons}
    if isinstance(executor, GroupExecutor):
        reasons["all_reduce"] = executor.collectives
    lines = [
        f"architecture = {spec.architecture}: {spec.num_layers} layers, {spec.vocab_size} tokens in the vocabulary",
        f"kernels = {executor.kernels}",
    ]
    hidden = ["num_pages", "max_seq_len_override", "host", "port", "shell", "model", "api_key"]
    if config.tp == 1:
        hidden += ["all_reduce", "disable_pynccl"]
    for name in (field.name for field in dataclasses.fields(config) if field.name not in hidden):
        if name in reasons or getattr(config, name) not in (None, ()):
            lines.append(f"{name} = {getattr(config, name)}" + (f": {reasons[name]}" if name in reasons else ""))
    lines.append(f"num_pages = {num_pages}: {num_pages * config.page_size} tokens of KV in pages of {config.page_size}")
    why = "all that the KV pages hold" if fits < max_seq_len(config, spec) else "as given"
    lines.append(f"max_seq_len = {fits}: {why if fits != spec.max_position else 'what the model was made for'}")
    return tuple(lines)
