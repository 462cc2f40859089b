"""Logits processors: what a request may do to its logits before a token is sampled, and log-probabilities."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minisgl.core.decoder import Decoder
from minisgl.core.kv_cache import DeviceTables, upload
from minisgl.core.plan import LogitsInit, LogitsRows, Masks, Scores, StepPlan
from minisgl.core.types import MAX_LOGIT_BIAS

CHUNK_LOGITS = 1 << 23  # logits that are worked on at a time, which take about 30 bytes of memory each
WORD = 32  # tokens in an int32 word of a mask; the lowest bit is the first token


@dataclass
class StepOutput:
    """What a step leaves on the device. Logits and tokens are good until the next step of the same size is launched."""

    tokens: Tensor  # int32 (len(sampled_slots),)
    logits: Tensor  # (len(sampled_slots), V), the model's own
    scores: Scores[Tensor] | None = None
    prompt_scores: Scores[Tensor] | None = None


class LogitsProcessors:
    """The logits processors of one runner, behind the sampling of all rows. The host never waits here.

    Their tables are allocated with the first row that needs them.
    """

    def __init__(self, decoder: Decoder, tables: DeviceTables, device: torch.device) -> None:
        self.decoder = decoder
        self.tables = tables
        self.device = device
        self.rows_at_once = max(1, CHUNK_LOGITS // decoder.spec.vocab_size)
        self.seen: Tensor | None = None  # int32 (rows, V), see `penalise`
        self.biases: tuple[Tensor, Tensor] | None = None  # (rows, MAX_LOGIT_BIAS) each: ids int64, values float32

    def admit(self, init: LogitsInit) -> None:
        rows, vocab, width = len(self.tables.length), self.decoder.spec.vocab_size, init.bias_ids.shape[1]
        places = init.seen_slots.astype(np.int64) * vocab + init.seen_tokens
        arrays: dict[str, NDArray[Any]] = {"slots": init.slots.astype(np.int64), "places": places, "seen": init.seen}
        arrays |= {"bias_ids": init.bias_ids.astype(np.int64), "bias_values": init.bias_values}
        values = upload(arrays, self.device)
        if self.seen is None and len(init.seen):
            self.seen = torch.zeros((rows, vocab), dtype=torch.int32, device=self.device)
        if self.seen is not None:
            self.seen.index_fill_(0, values["slots"], 0)
            self.seen.view(-1).index_copy_(0, values["places"], values["seen"])
        if self.biases is None and width:
            bias_values = torch.zeros((rows, MAX_LOGIT_BIAS), device=self.device)
            self.biases = bias_values.long(), bias_values
        if self.biases is not None:
            bias_ids, bias_values = self.biases
            bias_values.index_fill_(0, values["slots"], 0)
            bias_values[:, :width].index_copy_(0, values["slots"], values["bias_values"])
            bias_ids[:, :width].index_copy_(0, values["slots"], values["bias_ids"])

    def run(self, plan: StepPlan, output: StepOutput, masks: Masks | None) -> None:
        """Sample changed rows again and write the log-probabilities of scored ones, both to `output`."""
        wanted = plan.logits
        assert wanted is not None
        if len(wanted.changed):
            self._resample(plan, wanted, output, masks)
        if len(wanted.scored):
            index = upload({"scored": wanted.scored.astype(np.int64)}, self.device)["scored"]
            tokens = output.tokens.index_select(0, index).long()
            output.scores = self._scores(lambda rows: output.logits.index_select(0, index[rows]), tokens, wanted.top)

    def score_prompts(self, plan: StepPlan, hidden: Tensor, output: StepOutput) -> None:
        """Write the log-probabilities of the plan's prompt tokens, by hidden states (q, D), to `output`."""
        wanted = plan.logits
        assert wanted is not None
        tokens = upload({"targets": wanted.prompt_targets.astype(np.int64)}, self.device)["targets"]
        output.prompt_scores = self._scores(lambda rows: self.decoder.logits(hidden[rows]), tokens, wanted.prompt_top)

    def _chunks(self, rows: int) -> list[slice]:
        return [slice(start, start + self.rows_at_once) for start in range(0, rows, self.rows_at_once)]

    def _scores(self, logits_of: Callable[[slice], Tensor], tokens: Tensor, top: int) -> Scores[Tensor]:
        """Of tokens int64 (n,), a few rows at a time."""
        gather = self.decoder.ops.gather_logits
        parts = [token_scores(gather(logits_of(rows)), tokens[rows], top) for rows in self._chunks(len(tokens))]
        return parts[0] if len(parts) == 1 else Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _resample(self, plan: StepPlan, wanted: LogitsRows, output: StepOutput, masks: Masks | None) -> None:
        arrays: dict[str, NDArray[Any]] = {"changed": wanted.changed.astype(np.int64), "penalties": wanted.penalties}
        arrays["slots"] = plan.sampled_slots[wanted.changed].astype(np.int64)
        if masks is not None:  # the last one, of all ones, is for changed rows without a grammar
            mask_of = np.full(len(wanted.changed), len(masks), np.int64)
            mask_of[wanted.constrained] = np.arange(len(masks))
            arrays["mask_of"] = mask_of
            arrays["masks"] = np.concatenate([masks, np.full_like(masks[:1], -1)])
        inputs = upload(arrays, self.device)
        for rows in self._chunks(len(wanted.changed)):
            changed, slots = inputs["changed"][rows], inputs["slots"][rows]
            logits = self.decoder.ops.gather_logits(output.logits.index_select(0, changed))
            logits = logits.to(torch.float32, copy=True)
            # In the order that SamplingParams gives:
            if wanted.penalised:
                assert self.seen is not None
                penalise(logits, self.seen.index_select(0, slots), *inputs["penalties"][:3, rows])
            if width := wanted.bias_width:
                assert self.biases is not None
                logits.scatter_add_(1, *(part[:, :width].index_select(0, slots) for part in self.biases))
            if masks is not None:
                forbid(logits, inputs["masks"].index_select(0, inputs["mask_of"][rows]))
            positions = self.tables.length.index_select(0, slots)
            tokens = self.decoder.ops.sample_gathered(logits, self.tables.sampling, slots, positions)
            output.tokens.index_copy_(0, changed, tokens)
            self.tables.last_token.index_copy_(0, slots, tokens)
            if self.seen is not None and wanted.penalised:  # count the tokens
                places = slots * self.decoder.spec.vocab_size + tokens
                self.seen.view(-1).index_add_(0, places, torch.full_like(tokens, 2))


def penalise(logits: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    """Change float32 logits (n, V) in place, and return them, by the tokens that each row has seen.

    seen int32 (n, V): twice a token's count in the completion, plus one if it is in the prompt. A seen token's logit is
    divided by `repetition` (n,) where positive, else multiplied (Keskar et al., CTRL, 2019); then `frequency` (n,)
    times its count in the completion and, if it is there, `presence` (n,) are subtracted (OpenAI's API reference).
    1, 0 and 0 change no bit.
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


def token_scores(logits: Tensor, tokens: Tensor, top: int) -> Scores[Tensor]:
    """The scores of tokens int64 (n,) by logits (n, V), and of the `top` highest; of equal ones the lowest ids."""
    top = min(top, logits.shape[1])
    exact = logits.float()
    total = exact.logsumexp(dim=-1, keepdim=True)
    chosen = exact.gather(1, tokens.unsqueeze(1)).sub_(total).squeeze(1)
    if top == 0:
        none = exact.new_empty((len(exact), 0))
        return Scores(chosen, none.int(), none)
    ids = (_ranks(exact).topk(top, dim=-1).values & 0xFFFFFFFF).neg_().add_(logits.shape[1] - 1)
    return Scores(chosen, ids.int(), exact.gather(1, ids).sub_(total))


def _ranks(logits: Tensor) -> Tensor:
    """An int64 for each float32 logit (n, V), all different, ordered by logit and then by lower id. -0 equals 0.

    The high half is the float's bit pattern made to order as an integer, the low half counts the ids down.
    """
    bits = (logits + 0.0).view(torch.int32)
    bits = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    last = logits.shape[1] - 1
    ids = torch.arange(last, -1, -1, dtype=torch.int64, device=logits.device)
    return bits.long().bitwise_left_shift_(32).bitwise_or_(ids)
