"""Which rotary embedding a model uses, read from either form of its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from minisgl.errors import ModelError
from minisgl.models.fields import Fields

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding (RoFormer, arXiv 2104.09864) and how it is stretched to longer contexts.

    `theta` is the base. `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength exceeds
    `original_max_position / low_freq_factor` tokens and interpolates up to `original_max_position / high_freq_factor`.
    `yarn` (arXiv 2309.00071) ramps between the two from `beta_fast` to `beta_slow` rotations over
    `original_max_position` tokens (the ramp's ends rounded outwards where `truncate`), and scales cos and sin by
    `attention_factor`; where that is None it follows from `factor`, `mscale` and `mscale_all_dim`.
    Fields that the kind does not use keep their defaults.
    """

    kind: RopeKind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(config: Fields, max_position: int) -> Rope:
    """The rope of a `config.json`, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Raises ModelError for a kind that is not supported, parameters per layer type, and partial rotation.
    """
    name = "rope_scaling" if "rope_scaling" in config else "rope_parameters"
    rope = config.section(name, {})
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ModelError(f"{rope.where}: rope parameters per layer type are not supported")
    for fields in (config, rope):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{fields.where}: partial_rotary_factor other than 1 is not supported")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in get_args(RopeKind):
        raise ModelError(
            f"{rope.where}: rope kind {kind!r} is not supported; those that are: {', '.join(get_args(RopeKind))}"
        )
    if kind == "default":
        return Rope(kind="default", theta=theta)
    if kind == "linear":
        return Rope(kind="linear", theta=theta, factor=rope.number("factor"))
    key = "original_max_position_embeddings"
    original = config.integer(key) if key in config else rope.integer(key, max_position)
    factor = rope.number("factor", max_position / original if kind == "yarn" else None)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"larger than low_freq_factor ({low})")
        return Rope(
            kind="llama3", theta=theta, factor=factor, low_freq_factor=low, high_freq_factor=high,
            original_max_position=original,
        )  # fmt: skip
    return Rope(
        kind=cast(RopeKind, kind),
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number_or_none("attention_factor"),
        mscale=rope.number_or_none("mscale"),
        mscale_all_dim=rope.number_or_none("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
