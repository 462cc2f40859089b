"""How a model is cut between the ranks of a tensor-parallel group (Megatron-LM: Shoeybi et al., arXiv 1909.08053).

Attention is cut by heads and the MLP by its width: the first matrix of each pair by rows, the second by columns, so
that one sum over the ranks ends each block. Embedding and head are cut by tokens. Where there are fewer KV heads than
ranks, neighbouring ranks hold the same one. Norms and routers are whole everywhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minisgl.core.model_config import ModelSpec
from minisgl.core.weights import Cut, Keep, Parameter
from minisgl.errors import ConfigError

VOCAB_ALIGNMENTS = ((65536, 1024), (0, 64))
"""From a vocabulary of how many tokens on a shard's are a multiple of what: few and large pieces for the sampling
kernels, which look at 64 tokens at the least, where the padding is below 3 % for 8 ranks."""
ONE_RANK = ("o_bias", "down_bias")
"""Added once to a sum over ranks: the first rank has them."""
BY_COLUMN = {"o": 1, "down": 1, "expert_down": 2}


@dataclass(frozen=True)
class VocabShard:
    """The token ids [first, first + real) of one rank; its tensors have `width` rows or columns, padding behind."""

    first: int
    real: int
    width: int
    vocab: int


def vocab_shard(vocab: int, rank: int, size: int) -> VocabShard:
    """The tokens of a rank. Every rank's shard has the same width; the last may be padded, or empty in tiny ones."""
    alignment = next(alignment for least, alignment in VOCAB_ALIGNMENTS if vocab >= least)
    width = -(-vocab // (size * alignment)) * alignment
    first = rank * width
    return VocabShard(first, max(0, min(width, vocab - first)), width, vocab)


def check_shards(spec: ModelSpec, size: int) -> None:
    """Raise ConfigError naming what cannot be divided by this many ranks."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ConfigError(f"--tp {size}: {spec.architecture} cannot be cut into {size}: {what}")

    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    need(heads % size == 0, f"its {heads} query heads are not a multiple of {size}")
    need(
        kv_heads % size == 0 or size % kv_heads == 0,
        f"its {kv_heads} KV heads are neither a multiple nor a divisor of {size}",
    )
    if spec.moe is None or not all(spec.moe.layers):
        width = spec.intermediate_size
        need(width % size == 0, f"its MLP width of {width} is not a multiple of {size}")
    if spec.moe is not None:
        need(spec.moe.width % size == 0, f"its experts' width of {spec.moe.width} is not a multiple of {size}")


def local_spec(spec: ModelSpec, size: int) -> ModelSpec:
    """The model as each rank of `size` sees it: its share of heads and widths, and the whole vocabulary."""
    if size == 1:
        return spec
    moe = spec.moe
    return dataclasses.replace(
        spec,
        num_heads=spec.num_heads // size,
        num_kv_heads=max(1, spec.num_kv_heads // size),
        intermediate_size=spec.intermediate_size // size,
        moe=None if moe is None else dataclasses.replace(moe, width=moe.width // size),
    )


def cutter(spec: ModelSpec, rank: int, size: int) -> Cut:
    """What this rank keeps of each parameter of the whole model `spec`."""
    vocab = vocab_shard(spec.vocab_size, rank, size)

    def part(start: int, length: int) -> tuple[int, int]:
        share = length // size
        return start + rank * share, start + (rank + 1) * share

    def heads() -> tuple[tuple[int, int], ...]:
        dim, kv_heads = spec.head_dim, spec.num_kv_heads
        held = max(1, kv_heads // size)
        first = rank * held if kv_heads >= size else rank // (size // kv_heads)
        k, v = spec.num_heads * dim, (spec.num_heads + kv_heads) * dim
        span = [(start + first * dim, start + (first + held) * dim) for start in (k, v)]
        return (part(0, spec.num_heads * dim), *span)

    def cut(parameter: Parameter) -> Keep | None:
        field, shape = parameter.field, parameter.shape
        if field in ("embedding", "head"):
            return Keep(0, ((vocab.first, vocab.first + vocab.real),) if vocab.real else (), vocab.width - vocab.real)
        if field in ("qkv", "qkv_bias"):
            return Keep(0, heads())
        if field in ("gate_up", "gate_up_bias", "expert_gate_up"):
            axis = 1 if field == "expert_gate_up" else 0
            half = shape[axis] // 2
            return Keep(axis, (part(0, half), part(half, half)))
        if field in BY_COLUMN:
            return Keep(BY_COLUMN[field], (part(0, shape[BY_COLUMN[field]]),))
        if field in ONE_RANK:
            return None if rank == 0 else Keep(0, ())
        return None

    return cut
