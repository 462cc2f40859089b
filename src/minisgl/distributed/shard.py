"""How a model is split between the ranks of a tensor-parallel group (Megatron-LM: Shoeybi et al., arXiv 1909.08053).

Attention is split by heads and the MLP by its width: the first matrix of each pair by rows, the second by columns, so
that one all-reduce ends each block. Embedding and head are split by tokens. With fewer KV heads than ranks,
neighbouring ranks hold the same one. Norms and routers are replicated.
"""

import dataclasses

from minisgl.core.model_config import ModelSpec
from minisgl.core.weights import Parameter, Shard, Sharder
from minisgl.errors import ConfigError

# (vocabulary, multiple): from how many tokens on the width of a shard is a multiple of what. The sampling kernels read
# blocks of 64 tokens at least; the larger multiple gives them large blocks, where it pads less than 3 % for 8 ranks.
VOCAB_ALIGNMENTS = ((65536, 1024), (0, 64))
ONE_RANK = ("o_bias", "down_bias")  # of the GEMMs that are all-reduced: rank 0 alone adds them
BY_COLUMN = {"o": 1, "down": 1, "expert_down": 2}


@dataclasses.dataclass(frozen=True)
class VocabShard:
    """The token ids [first, first + real) of one rank. Its tensors have `width` rows or columns, some padding."""

    first: int
    real: int
    width: int
    vocab: int


def vocab_shard(vocab: int, rank: int, size: int) -> VocabShard:
    """The tokens of a rank. Every rank's shard has the same width; the last may be padded, or empty."""
    alignment = next(alignment for least, alignment in VOCAB_ALIGNMENTS if vocab >= least)
    width = -(-vocab // (size * alignment)) * alignment
    first = rank * width
    return VocabShard(first, max(0, min(width, vocab - first)), width, vocab)


def check_shards(spec: ModelSpec, size: int) -> None:
    """Raise ConfigError naming what this many ranks cannot divide, and the numbers of ranks that are possible."""
    if why := _obstacle(spec, size):
        possible = ", ".join(str(n) for n in range(1, spec.num_heads + 1) if not _obstacle(spec, n))
        what = f"{spec.architecture} cannot be split into {size}"
        raise ConfigError(f"--tp {size}: {what}: {why}; --tp can be {possible}")


def _obstacle(spec: ModelSpec, size: int) -> str:
    heads, kv_heads, width = spec.num_heads, spec.num_kv_heads, spec.intermediate_size
    if heads % size:
        return f"its {heads} query heads are not a multiple of {size}"
    if kv_heads % size and size % kv_heads:
        return f"its {kv_heads} KV heads are neither a multiple nor a divisor of {size}"
    if (spec.moe is None or not all(spec.moe.layers)) and width % size:
        return f"its MLP width of {width} is not a multiple of {size}"
    if spec.moe is not None and spec.moe.width % size:
        return f"its experts' width of {spec.moe.width} is not a multiple of {size}"
    return ""


def local_spec(spec: ModelSpec, size: int) -> ModelSpec:
    """The model as each rank of `size` sees it: its share of heads and widths, and the whole vocabulary."""
    moe = spec.moe
    return dataclasses.replace(
        spec,
        num_heads=spec.num_heads // size,
        num_kv_heads=max(1, spec.num_kv_heads // size),
        intermediate_size=spec.intermediate_size // size,
        moe=None if moe is None else dataclasses.replace(moe, width=moe.width // size),
    )


def sharder(spec: ModelSpec, rank: int, size: int) -> Sharder:
    """What this rank keeps of each parameter of the whole model `spec`."""
    vocab = vocab_shard(spec.vocab_size, rank, size)

    def part(start: int, length: int) -> tuple[int, int]:
        share = length // size
        return start + rank * share, start + (rank + 1) * share

    def shard(parameter: Parameter) -> Shard | None:
        field, shape = parameter.field, parameter.shape
        if field in ("embedding", "head"):
            return Shard(0, ((vocab.first, vocab.first + vocab.real),) if vocab.real else (), vocab.width - vocab.real)
        if field in ("qkv", "qkv_bias"):
            dim, kv_heads = spec.head_dim, spec.num_kv_heads
            held = max(1, kv_heads // size)
            first = rank * held if kv_heads >= size else rank // (size // kv_heads)
            k, v = spec.num_heads * dim, (spec.num_heads + kv_heads) * dim
            own = ((start + first * dim, start + (first + held) * dim) for start in (k, v))
            return Shard(0, (part(0, k), *own))
        if field in ("gate_up", "gate_up_bias", "expert_gate_up"):
            axis = 1 if field == "expert_gate_up" else 0
            half = shape[axis] // 2
            return Shard(axis, (part(0, half), part(half, half)))
        if field in BY_COLUMN:
            return Shard(BY_COLUMN[field], (part(0, shape[BY_COLUMN[field]]),))
        if field in ONE_RANK:
            return None if rank == 0 else Shard(0, ())
        return None

    return shard
