"""Sampling: filters, and the Gumbel-max trick: argmax of logit / T - log E is distributed as softmax(logit / T).

The exponential noise E is a counter-based hash (Salmon et al., 2011, with the finalisers of SplitMix64, Steele et al.,
2014, and MurmurHash3) of (seed, position, token id): neither the rest of the batch nor the order of steps matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FEW = (64, 1024)  # of the highest logits that a filter looks at before it sorts the whole vocabulary, on the CPU
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
SPLITMIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
MURMUR = ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32))
LARGEST_UNIFORM = 1.0 - 2.0**-24


@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """Sampling parameters of n rows, as tensors (n,) on the device."""

    temperature: Tensor  # float32; 0 is greedy
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    top_k: Tensor  # int32; 0 is off, 1 is greedy
    seed: Tensor  # int64, the 64 bits of the seed
    min_len: Tensor  # int32; no stop id is sampled at a position below, counted from the first prompt token
    stop_ids: Tensor  # int32 (n, stops), padded with -1

    def select(self, index: Tensor) -> "SamplingRows":
        return SamplingRows(**{name: value.index_select(0, index) for name, value in vars(self).items()})


def sample(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """Choose a token for each row: logits (n, V), positions int32 (n,) of the chosen tokens -> int32 (n,).

    Stop ids cannot be chosen below `min_len`. Greedy rows take the highest logit, of equal ones the lowest id. Others
    divide by the temperature, keep the `top_k` highest, of those the fewest whose share of the probability
    reaches `top_p`, and of those the ones at least `min_p` times as probable as the first; tokens as probable as the
    last one kept are kept too.
    """
    if may_hold(positions < rows.min_len):
        logits = mask_stop_ids(logits, rows, positions)
    greedy_tokens = logits.argmax(dim=-1).to(torch.int32)
    is_random = (rows.temperature > 0) & (rows.top_k != 1)
    if logits.device.type == "cpu":
        random = torch.nonzero(is_random).squeeze(1)  # on a GPU this would wait for the device
        if len(random):
            sampled = _sample_random(logits.index_select(0, random), rows.select(random), positions[random])
            greedy_tokens.index_copy_(0, random, sampled)
        return greedy_tokens
    return torch.where(is_random, _sample_random(logits, rows, positions), greedy_tokens)


def may_hold(condition: Tensor) -> bool:
    """Whether a condition holds for any row; True on a GPU, where to know it the host would wait for the device."""
    return condition.device.type != "cpu" or bool(condition.any())


def mask_stop_ids(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    """Logits with -inf at the stop ids of the rows whose token would come before `min_len`."""
    masked = (positions < rows.min_len).unsqueeze(1) & (rows.stop_ids >= 0)  # (n, stops)
    # A column of its own takes what is not masked.
    column = torch.where(masked, rows.stop_ids, logits.shape[1]).long()
    wide = torch.cat([logits, logits.new_zeros(len(logits), 1)], dim=1)
    return wide.scatter_(1, column, float("-inf"))[:, :-1]


def _sample_random(logits: Tensor, rows: SamplingRows, positions: Tensor) -> Tensor:
    scaled = logits.float()
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)  # so that no temperature overflows what counts
    scaled /= rows.temperature.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    if may_hold((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)):
        scaled = scaled.masked_fill(scaled < threshold(scaled, rows), float("-inf"))
    noise = gumbel_noise(rows.seed, positions, scaled.shape[1])
    return noise.add_(scaled).argmax(dim=-1).to(torch.int32)


def threshold(scaled: Tensor, rows: SamplingRows) -> Tensor:
    """The lowest value that top_k, top_p and min_p keep. scaled float32 (n, V), highest of each row 0 -> (n, 1)."""
    vocab, total = scaled.shape[1], scaled.exp().sum(dim=-1, keepdim=True)
    few = [width for width in FEW if width < vocab] if scaled.device.type == "cpu" else []
    for width in (*few, vocab):
        top = scaled.topk(width, dim=-1).values if width < vocab else scaled.sort(dim=-1, descending=True).values
        lowest, complete = lowest_kept(top, total, rows, vocab)
        if width == vocab or bool(complete.all()):
            break
    return torch.maximum(lowest, rows.min_p.log()).unsqueeze(1)


def lowest_kept(top: Tensor, total: Tensor, rows: SamplingRows, vocab: int) -> tuple[Tensor, Tensor]:
    """The lowest value that top_k and top_p keep of a row's highest w, and whether it is that of all; both (n,).

    top float32 (n, w) descending, the first 0; total (n, 1) the sum of the exponentials of all `vocab` values.
    """
    width = top.shape[1]
    limit = torch.where(rows.top_k > 0, rows.top_k, vocab).unsqueeze(1)
    top_p = rows.top_p.unsqueeze(1)
    survives = torch.arange(width, device=top.device) < limit
    mass = top.exp() * survives
    limited = limit <= width
    total = torch.where(limited, mass.sum(dim=-1, keepdim=True), total)
    reached = mass.cumsum(dim=-1) / total  # probability of a token and those above it
    keeps = survives & ((reached - mass / total < top_p) | (top_p >= 1))
    keeps[:, 0] = True
    lowest = top.gather(1, keeps.sum(dim=-1, keepdim=True) - 1)
    unlimited = (top_p >= 1) & (rows.top_k == 0).unsqueeze(1)
    complete = unlimited | limited | ((top_p < 1) & (limit >= vocab) & (reached[:, -1:] >= top_p))
    return lowest.masked_fill(unlimited, float("-inf")).squeeze(1), complete.squeeze(1)


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """-log E, E exponential, for each token: int64 (n,), int32 (n,) -> float32 (n, vocab_size)."""
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seed.device)
    bits = token_hash(seed, position, tokens)
    uniform = bits.view(torch.uint32).to(torch.float32)
    uniform.add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def token_hash(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """32 random-looking bits for each (seed, position, token): int64 (n,), int32 (n,), int32 (V,) -> int32 (n, V).

    Integers wrap. Seed and position give two 32-bit keys (SplitMix64); a token is mixed with one, then with the other
    (MurmurHash3's finaliser).
    """
    key = seed + (position.long() + 1) * GOLDEN
    for shift, factor in SPLITMIX:
        key = (key ^ _shift_right(key, shift, 64)) * factor
    key = key ^ _shift_right(key, 31, 64)
    low, high = key.to(torch.int32), _shift_right(key, 32, 64).to(torch.int32)
    bits = token ^ low.unsqueeze(1)
    return _finalise(_finalise(bits) ^ high.unsqueeze(1))


def _finalise(bits: Tensor) -> Tensor:
    for shift, factor in MURMUR:
        bits ^= _shift_right(bits, shift, 32)
        bits *= factor
    bits ^= _shift_right(bits, 16, 32)
    return bits


def _shift_right(bits: Tensor, shift: int, width: int) -> Tensor:
    """Logical shift; torch's own copies the sign."""
    return (bits >> shift).bitwise_and_((1 << (width - shift)) - 1)
