"""The host's side of rows that ask for more than sampling: what a plan says of them, and what their results become."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from minisgl.engine.plan import Int32, Scores, SpecialInit, SpecialRows, StepPlan, StepResult
from minisgl.engine.table import RequestTable, State
from minisgl.types import TokenLogprobs


def init_special(table: RequestTable, slots: list[int]) -> SpecialInit | None:
    """What the device must know of those of the admitted rows whose logits will be changed; None without any."""
    changed = [slot for slot in slots if changes_logits(table, slot)]
    if not changed:
        return None
    width = int(table.biases[changed].max())
    bias_ids = np.zeros((len(changed), width), np.int32)
    bias_values = np.zeros((len(changed), width), np.float32)
    seen: list[tuple[Int32, Int32]] = []
    for index, slot in enumerate(changed):
        entry = table.entry(slot)
        bias = entry.request.params.logit_bias
        bias_ids[index, : len(bias)] = list(bias)
        bias_values[index, : len(bias)] = list(bias.values())
        prompt = len(entry.request.prompt) if table.penalised[slot] else 0
        held = entry.tokens if table.penalised[slot] else entry.tokens[:0]
        seen.append(count_tokens(held[:prompt], held[prompt:]))
    return SpecialInit(
        slots=np.array(changed, np.int32),
        seen_slots=np.repeat(np.array(changed, np.int32), [len(tokens) for tokens, _ in seen]),
        seen_tokens=np.concatenate([tokens for tokens, _ in seen]),
        seen=np.concatenate([counts for _, counts in seen]),
        bias_ids=bias_ids,
        bias_values=bias_values,
    )


def count_tokens(prompt: Int32, answer: Int32) -> tuple[Int32, Int32]:
    """The distinct tokens of both, and twice each one's count in the answer plus one if it is in the prompt."""
    both = 2 * np.bincount(answer, minlength=int(prompt.max(initial=-1)) + 1)
    both[prompt] += 1
    tokens = np.flatnonzero(both)
    return tokens.astype(np.int32), both[tokens].astype(np.int32)


def changes_logits(table: RequestTable, slots: int | NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether rows draw from other logits than the model's own."""
    return np.asarray(table.penalised[slots] | (table.biases[slots] > 0) | table.constrained[slots])


def plan_special(
    table: RequestTable, sampled: Int32, chunks: tuple[Int32, Int32, Int32], decodes: int
) -> SpecialRows | None:
    """What a step of so many decodes owes to special rows, None if nothing; moves on how far prompts are scored.

    `chunks` are slots, starts and lengths.
    """
    if not (table.special[sampled].any() or table.special[chunks[0]].any()):
        return None
    changed = np.flatnonzero(changes_logits(table, sampled)).astype(np.int32)
    scored = np.flatnonzero(table.top[sampled] >= 0).astype(np.int32)
    prompts = list(_score_prompts(table, chunks, decodes)) if table.scores_prompt[chunks[0]].any() else []
    if not (len(changed) or len(scored) or prompts):
        return None
    slots = sampled[changed]
    none = np.empty(0, np.int32)
    return SpecialRows(
        changed=changed,
        penalties=table.penalties[:, slots],
        penalised=bool(table.penalised[slots].any()),
        bias_width=int(table.biases[slots].max(initial=0)),
        constrained=np.flatnonzero(table.constrained[slots]).astype(np.int32),
        scored=scored,
        top=int(table.top[sampled].max(initial=0)),
        prompt_rows=np.concatenate([none, *(rows for _, rows, _ in prompts)]),
        prompt_targets=np.concatenate([none, *(targets for _, _, targets in prompts)]),
        prompt_slots=np.array([slot for slot, _, _ in prompts], np.int32),
        prompt_counts=np.array([len(rows) for _, rows, _ in prompts], np.int32),
        prompt_top=max((table.entry(slot).request.params.prompt_logprobs or 0 for slot, _, _ in prompts), default=0),
    )


def _score_prompts(
    table: RequestTable, chunks: tuple[Int32, Int32, Int32], decodes: int
) -> Iterator[tuple[int, Int32, Int32]]:
    """For each chunk with prompt tokens yet to be scored: its slot, places among the step's tokens, and the tokens."""
    place = decodes
    for slot, start, length in zip(*(part.tolist() for part in chunks), strict=True):
        if table.scores_prompt[slot]:
            entry = table.entry(slot)
            first, last = max(start, entry.scored), min(start + length, len(entry.request.prompt) - 1)
            if first < last:
                rows = np.arange(place + first - start, place + last - start, dtype=np.int32)
                yield slot, rows, table.tokens[slot, first + 1 : last + 1].copy()
                entry.scored = last
        place += length


def take_scores(table: RequestTable, plan: StepPlan, result: StepResult) -> dict[int, TokenLogprobs]:
    """The scores of the step's tokens by slot; those of prompts are added to their entries."""
    if plan.special is None:
        return {}
    if result.prompt_scores is not None:
        slots = np.repeat(plan.special.prompt_slots, plan.special.prompt_counts)
        for slot, scores in unpack(slots, result.prompt_scores):
            if table.state[slot] != State.ENDED:
                entry = table.entry(slot)
                entry.prompt_scores.append(shorten(scores, entry.request.params.prompt_logprobs or 0))
    if result.scores is None:
        return {}
    slots = plan.sampled_slots[plan.special.scored]
    return {slot: shorten(scores, int(table.top[slot])) for slot, scores in unpack(slots, result.scores)}


def unpack(slots: Int32, scores: Scores) -> Iterator[tuple[int, TokenLogprobs]]:
    """Each slot with the scores of its token."""
    columns = zip(
        slots.tolist(),
        scores.logprobs.tolist(),
        scores.top_ids.tolist(),
        scores.top_logprobs.tolist(),
        strict=True,
    )
    for slot, logprob, ids, logprobs in columns:
        yield slot, TokenLogprobs(logprob, tuple(ids), tuple(logprobs))


def shorten(scores: TokenLogprobs, top: int) -> TokenLogprobs:
    """The scores with only as many of the most probable tokens as were asked for."""
    if len(scores.top_ids) == top:
        return scores
    return TokenLogprobs(scores.logprob, scores.top_ids[:top], scores.top_logprobs[:top])
