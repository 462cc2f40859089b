"""From a configuration to a running engine: find the model, resolve what was left open, load, size the cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from minisgl.config import BUNDLED_MODEL, Config, Machine, Resolved, resolve
from minisgl.engine.engine import Engine
from minisgl.engine.local import LocalExecutor, build_local_executor
from minisgl.models.locate import locate_model
from minisgl.models.spec import ModelSpec, read_spec
from minisgl.types import ModelInfo


@dataclasses.dataclass(frozen=True)
class Built:
    """An engine and what its faces need: the folder with the tokenizer, and a line for each value that was chosen."""

    engine: Engine
    folder: Path
    notes: tuple[str, ...]


def probe_machine() -> Machine:
    """What there is to run on."""
    if not torch.cuda.is_available():
        return Machine()
    return Machine(True, torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)


def build_engine(config: Config, progress: bool = False) -> Built:
    """Load the model that `config` names. Raises ConfigError or ModelError with what to change."""
    machine = probe_machine()
    guess = resolve(config, machine).config
    folder = locate_model(
        config.model, config.model_source, dtype=guess.dtype, weights=not config.dummy_weight, progress=progress
    )
    spec = read_spec(folder)
    resolved = resolve(config, machine, spec.checkpoint_dtype)
    wanted = max_seq_len(resolved.config, spec)
    executor = build_local_executor(resolved.config, folder, spec, wanted, progress=progress)
    fits = min(wanted, executor.num_pages * config.page_size)
    model = ModelInfo(
        name=model_name(config), vocab_size=spec.vocab_size, max_seq_len=fits, eos_token_ids=spec.eos_token_ids
    )
    return Built(Engine(executor, model, resolved.config), folder, describe(resolved, spec, executor, fits))


def max_seq_len(config: Config, spec: ModelSpec) -> int:
    """Tokens a sequence may hold: the override, or the model's own limit."""
    return config.max_seq_len_override or spec.max_position


def model_name(config: Config) -> str:
    """The id under which the model is served: what the user called it."""
    if config.model is None or config.model == BUNDLED_MODEL:
        return "SmolLM2-135M-Instruct"
    return config.model


def describe(resolved: Resolved, spec: ModelSpec, executor: LocalExecutor, fits: int) -> tuple[str, ...]:
    """The effective configuration, a line each."""
    config = resolved.config
    chosen = {note.split(" = ")[0]: note for note in resolved.notes}
    lines = [
        f"architecture = {spec.architecture}: {spec.num_layers} layers, {spec.vocab_size} tokens in the vocabulary"
    ]
    chosen.setdefault("attn", f"attn = {config.attn}: {executor.attention_choice}")
    num_pages = executor.num_pages
    for field in dataclasses.fields(config):
        if field.name in ("num_pages", "max_seq_len_override", "host", "port", "shell", "model"):
            continue
        if field.name in chosen or getattr(config, field.name) not in (None, ()):
            lines.append(chosen.get(field.name, f"{field.name} = {getattr(config, field.name)}"))
    lines.append(f"num_pages = {num_pages}: {num_pages * config.page_size} tokens of KV in pages of {config.page_size}")
    why = "all that the KV pages hold" if fits < max_seq_len(config, spec) else "as asked for"
    lines.append(f"max_seq_len = {fits}: {why if fits != spec.max_position else 'what the model was made for'}")
    return tuple(lines)
