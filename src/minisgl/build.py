"""From a configuration to a running engine: find the model, resolve what was left open, load, size the cache."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from minisgl.config import BUNDLED_MODEL, Config, Launcher, Machine, Resolved, launcher, resolve
from minisgl.core.engine import Engine
from minisgl.core.executor import LocalExecutor, build_local_executor
from minisgl.core.model_config import ModelSpec, read_spec
from minisgl.core.types import ModelInfo
from minisgl.distributed.executor import GroupExecutor, build_group_executor
from minisgl.errors import ConfigError
from minisgl.formats.hub import locate_model
from minisgl.text.grammar_check import build_constraints


@dataclasses.dataclass(frozen=True)
class Built:
    """An engine and what its faces need: the folder with the tokenizer, and a line for each value that was chosen."""

    engine: Engine
    folder: Path
    notes: tuple[str, ...]


def probe_machine(launched: Launcher | None = None) -> Machine:
    """What there is to run on."""
    if not torch.cuda.is_available():
        return Machine()
    cards = torch.cuda.device_count() if launched is None else launched.size
    if launched is not None and launched.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {launched.local_rank}: torch sees {torch.cuda.device_count()} CUDA cards here"
        )
    return Machine(True, torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory, cards)


def build_engine(config: Config, progress: bool = False, when_gone: Callable[[], None] | None = None) -> Built:
    """Load the model that `config` names. Raises ConfigError or ModelError with what to change.

    `when_gone` is called, from another thread, when one of several ranks is gone. A process that torchrun started as
    another rank than 0 stays here until rank 0 is done, and ends.
    """
    launched = launcher(config.tp)
    if launched is not None and launched.rank > 0:
        from minisgl.distributed.worker import serve_rank

        sys.exit(serve_rank(launched))
    machine = probe_machine(launched)
    guess = resolve(config, machine).config
    folder = locate_model(
        config.model, config.model_source, dtype=guess.dtype, weights=not config.dummy_weight, progress=progress
    )
    spec = read_spec(folder)
    resolved = resolve(config, machine, spec.checkpoint_dtype)
    wanted = max_seq_len(resolved.config, spec)
    executor: LocalExecutor | GroupExecutor
    if config.tp == 1:
        executor = build_local_executor(resolved.config, folder, spec, wanted, progress=progress)
    else:
        executor = build_group_executor(resolved.config, folder, spec, wanted, progress, launched, when_gone)
    fits = min(wanted, executor.num_pages * config.page_size)
    model = ModelInfo(
        name=model_name(config), vocab_size=spec.vocab_size, max_seq_len=fits, eos_token_ids=spec.eos_token_ids
    )
    engine = Engine(executor, model, resolved.config, build_constraints(folder, model))
    return Built(engine, folder, describe(resolved, spec, executor, fits))


def max_seq_len(config: Config, spec: ModelSpec) -> int:
    """Tokens a sequence may hold: the override, or the model's own limit."""
    return config.max_seq_len_override or spec.max_position


def model_name(config: Config) -> str:
    """The id under which the model is served: what the user called it."""
    if config.model is None or config.model == BUNDLED_MODEL:
        return "SmolLM2-135M-Instruct"
    return config.model


def describe(
    resolved: Resolved, spec: ModelSpec, executor: LocalExecutor | GroupExecutor, fits: int
) -> tuple[str, ...]:
    """The effective configuration, a line each."""
    config = resolved.config
    chosen = {note.split(" = ")[0]: note for note in resolved.notes}
    lines = [
        f"architecture = {spec.architecture}: {spec.num_layers} layers, {spec.vocab_size} tokens in the vocabulary"
    ]
    chosen.setdefault("attn", f"attn = {config.attn}: {executor.attention_choice}")
    if isinstance(executor, GroupExecutor):
        chosen["all_reduce"] = f"all_reduce = {config.all_reduce}: {executor.collectives}"
    lines.append(f"kernels = {executor.kernels}")
    num_pages = executor.num_pages
    for field in dataclasses.fields(config):
        if field.name in ("num_pages", "max_seq_len_override", "host", "port", "shell", "model"):
            continue
        if config.tp == 1 and field.name.startswith(("all_reduce", "disable_pynccl")):
            continue
        if field.name in chosen or getattr(config, field.name) not in (None, ()):
            lines.append(chosen.get(field.name, f"{field.name} = {getattr(config, field.name)}"))
    lines.append(f"num_pages = {num_pages}: {num_pages * config.page_size} tokens of KV in pages of {config.page_size}")
    why = "all that the KV pages hold" if fits < max_seq_len(config, spec) else "as asked for"
    lines.append(f"max_seq_len = {fits}: {why if fits != spec.max_position else 'what the model was made for'}")
    return tuple(lines)
