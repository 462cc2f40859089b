"""What a request may do to its logits before a token is drawn, and the log-probabilities read from them.

Plain torch for every device; the host never waits for one here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 32
"""Tokens to an int32 word of a mask; the lowest bit is the first token."""


class TokenScores(NamedTuple):
    """Log-probabilities, natural and by the model's own logits, of n tokens, and the most probable ones beside them."""

    logprobs: Tensor  # float32 (n,)
    top_ids: Tensor  # int32 (n, top)
    top_logprobs: Tensor  # float32 (n, top), highest first


def penalise(logits: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Change float32 logits (n, V) in place, and return them, by what each row has said already.

    seen int32 (n, V): twice a token's count in the answer, plus one if it is in the prompt. A seen token's logit is
    divided by `repetition` (n,) where positive, else multiplied (Keskar et al., CTRL, 2019); then `frequency` (n,)
    times its count in the answer and, if it is there, `presence` (n,) are subtracted (OpenAI's API reference). 1, 0 and
    0 change no bit.
    """
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    torch.where(seen > 0, repeated, logits, out=logits)
    del repeated
    counts = seen >> 1
    logits.sub_(counts * frequency.unsqueeze(1))
    return logits.sub_(counts.clamp_(max=1) * presence.unsqueeze(1))


def forbid(logits: Tensor, masks: Tensor) -> Tensor:
    """Set logits (n, V) to -inf in place where a mask's bit is 0, and return them. masks int32 (n, ceil(V / 32))."""
    bits = (masks.unsqueeze(2) >> torch.arange(WORD, dtype=torch.int32, device=masks.device)).bitwise_and_(1)
    forbidden = bits.view(len(masks), -1)[:, : logits.shape[1]] == 0
    return logits.masked_fill_(forbidden, float("-inf"))


def token_scores(logits: Tensor, tokens: Tensor, top: int) -> TokenScores:
    """The scores of tokens int64 (n,) by logits (n, V), and of the `top` highest; of equal ones the lowest ids."""
    top = min(top, logits.shape[1])
    exact = logits.float()
    total = exact.logsumexp(dim=-1, keepdim=True)
    chosen = exact.gather(1, tokens.unsqueeze(1)).sub_(total).squeeze(1)
    if top == 0:
        none = exact.new_empty((len(exact), 0))
        return TokenScores(chosen, none.int(), none)
    ids = (_ranks(exact).topk(top, dim=-1).values & 0xFFFFFFFF).neg_().add_(logits.shape[1] - 1)
    return TokenScores(chosen, ids.int(), exact.gather(1, ids).sub_(total))


def _ranks(logits: Tensor) -> Tensor:
    """An int64 for each float32 logit (n, V), all different, ordered by logit and then by lower id.

    The high half is the float's bit pattern made to order as an integer, the low half counts the ids down. -0 is 0.
    """
    bits = (logits + 0.0).view(torch.int32)
    bits = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    last = logits.shape[1] - 1
    ids = torch.arange(last, -1, -1, dtype=torch.int64, device=logits.device)
    return bits.long().bitwise_left_shift_(32).bitwise_or_(ids)
