"""The host's side of rows that ask for more than sampling: what a plan says of them, and what their results become.

The scheduler: decides what the next step does, and takes in what a step did. No torch, no clock, no I/O.

A step decodes every running request and, beside them, prefills chunks of prompts under a token budget
(Sarathi-Serve, Agrawal et al. 2024), so a long prompt stalls nobody. Pages are taken as they are needed. When they
run out, a request is retracted: it gives back its row and pages, waits in the queue before all that arrived after it,
and is prefilled again later, mostly from the prefix cache.

Requests are ranked by (priority, arrival), lower first. The last is retracted first. A waiting request also retracts
running ones, but only of strictly worse priority, and only if that makes room for it; so no two can take turns in
displacing each other, the first in rank is never retracted, and among equals each becomes the first in the end. Of
worse priority a request waits for as long as better ones keep coming: that is what a priority says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from minisgl.core.pages import CacheManager
from minisgl.core.plan import Int32, Masks, Scores, SpecialInit, SpecialRows, StepPlan, StepResult
from minisgl.core.policy import Policy
from minisgl.core.request_state import Entry, RequestTable, State, forbid_tokens, usable_words
from minisgl.core.types import FinishReason, TokenEvent, TokenLogprobs


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


Slots = NDArray[np.intp]
PageWrites = tuple[Int32, Int32, Int32]


class Scheduler:
    """Owns the waiting queue and the request table; the cache manager owns the pages."""

    def __init__(self, table: RequestTable, cache: CacheManager, policy: Policy, max_prefill_length: int) -> None:
        self.table = table
        self.cache = cache
        self.policy = policy
        self.max_prefill_length = max_prefill_length
        self.waiting: deque[Entry] = deque()
        self.live: dict[str, Entry] = {}
        self.step = 0
        self.retracted = 0

    def add(self, entry: Entry) -> None:
        """Queue an accepted request."""
        self.live[entry.request.id] = entry
        self._queue(entry)

    def _queue(self, entry: Entry) -> None:
        """Put a new or a retracted request in its place; the queue is in order of rank."""
        if not self.waiting or self.waiting[-1].rank < entry.rank:
            self.waiting.append(entry)
        else:
            self.waiting.insert(self._place(entry), entry)

    def _place(self, entry: Entry) -> int:
        """Where in the queue a request is, or belongs."""
        return bisect_left(self.waiting, entry.rank, key=lambda other: other.rank)

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request in whatever state it is; None when it is not live. Its pages may be freed later."""
        entry = self.live.get(request_id)
        if entry is None:
            return None
        if entry.slot < 0:
            place = self._place(entry)
            assert self.waiting[place] is entry
            del self.waiting[place]
            del self.live[request_id]
        else:
            self._end(entry.slot)
            self._settle([entry.slot])
        return TokenEvent(id=request_id, finish=FinishReason.ABORT, cached_tokens=max(entry.cached_tokens, 0))

    # Planning

    def plan(self) -> StepPlan | None:
        """Plan the next step and account for it as launched; None when no row can do anything now."""
        self._make_way()
        while True:
            decode, decode_writes = self._plan_decode()
            chunks, admitted, chunk_writes = self._plan_prefill()
            if len(decode) or chunks:
                return self._build(decode, chunks, admitted, [*decode_writes, *chunk_writes])
            stuck = self.table.rows_in(State.PREFILL, State.DECODE)
            if len(stuck) == 0 or self.table.in_flight.any() or not self._starved(stuck):
                return None
            self.retract_last()

    def _make_way(self) -> None:
        """Where the first waiting request finds no row or no pages, retract running ones of worse priority for it."""
        table, cache = self.table, self.cache
        if not self.waiting:
            return
        first = self.waiting[0]
        priority = first.request.priority
        if not (table.priority > priority).any():  # rows that are free may be among them
            return
        running = table.rows_in(State.PREFILL, State.DECODE)
        worse = running[table.priority[running] > priority]
        if len(worse) == 0:
            return
        leaving = self._leaving()
        rows = table.free_rows + len(leaving)
        pages = -(-len(first.tokens) // cache.page_size) - cache.match_len(first.reusable) // cache.page_size
        pages += self._promised(running, 1)
        with closing(cache.departures(np.concatenate([leaving, worse[::-1]]), first.reusable)) as departures:
            for victims, available in enumerate(islice(departures, len(leaving), None)):
                if victims:
                    pages -= self._promised(worse[::-1][victims - 1 : victims], 1)
                if rows + victims > 0 and pages <= available:
                    break
            else:
                return
        for _ in range(victims):
            self.retract_last()

    def _starved(self, slots: Slots) -> bool:
        """Whether some of these rows still have work to launch."""
        table = self.table
        return bool(np.any((table.state[slots] == State.PREFILL) | (table.computed[slots] + 1 < table.limit[slots])))

    def _plan_decode(self) -> tuple[Slots, list[PageWrites]]:
        """Rows that decode in this step, with pages for their next token; retracts the last when pages run out.

        Longest first: attention then ends with short rows, and few multiprocessors wait for the last (Graham's rule).
        """
        table, cache = self.table, self.cache
        slots = np.flatnonzero((table.state == State.DECODE) & (table.computed + 1 < table.limit))
        if len(slots) == 0:
            return slots, []
        need = cache.pages_needed(slots, table.computed[slots] + 1)
        if int(need.sum()) > cache.available:
            slots = self._make_room(slots)
            need = cache.pages_needed(slots, table.computed[slots] + 1)
        order = np.argsort(-table.computed[slots], kind="stable")
        slots, need = slots[order], need[order]
        grown = slots[need > 0]
        writes = [cache.extend(grown, table.computed[grown] + 1)] if len(grown) else []
        return slots, writes

    def _make_room(self, slots: Slots) -> Slots:
        """The decode rows that can go on, in order of rank, after retracting as many of the last as it takes."""
        table, cache = self.table, self.cache
        slots = table.ranked(slots)
        need = cache.pages_needed(slots, table.computed[slots] + 1)
        while len(slots) and int(need.sum()) > self._available_soon():
            victim = self.retract_last()
            keep = slots != victim
            slots, need = slots[keep], need[keep]
        return slots[np.cumsum(need) <= cache.available]

    def _leaving(self) -> Slots:
        """Rows that leave as soon as the step in flight is collected."""
        return np.flatnonzero((self.table.state == State.RETRACTING) | (self.table.state == State.ENDED))

    def _available_soon(self) -> int:
        """Pages that are available when those rows have left."""
        with closing(self.cache.departures(self._leaving())) as departures:
            return deque(departures, maxlen=1)[0]

    def _plan_prefill(self) -> tuple[list[tuple[int, int]], list[int], list[PageWrites]]:
        """Chunks as (slot, tokens), the slots admitted, and the page-table writes of both."""
        chunks: list[tuple[int, int]] = []
        admitted: list[int] = []
        writes: list[PageWrites] = []
        budget = self.max_prefill_length
        slots: Iterable[int] = self.table.rows_in(State.PREFILL).tolist()
        for slot in chain(slots, self._admissions(admitted, writes)):
            length = self._chunk(slot, budget)
            if length == 0:
                break
            done = int(self.table.computed[slot]) + length
            writes.append(self.cache.extend(np.array([slot]), np.array([done])))
            self.table.computed[slot] = done
            self.cache.publish(slot, self.table.tokens[slot, : self.table.known[slot]], done)
            chunks.append((slot, length))
            budget -= length
            if budget == 0:
                break
        return chunks, admitted, writes

    def _chunk(self, slot: int, budget: int) -> int:
        """Tokens of this row to prefill now: what is left, the budget and the available pages allow."""
        table, cache = self.table, self.cache
        computed = int(table.computed[slot])
        room = (int(cache.row_pages[slot]) + cache.available) * cache.page_size - computed
        return max(0, min(int(table.prefill_len[slot]) - computed, budget, room))

    def _admissions(self, admitted: list[int], writes: list[PageWrites]) -> Iterable[int]:
        """Admit waiting requests one by one, in the policy's order, as long as rows and pages last."""
        if not self.waiting or self.table.free_rows == 0:
            return
        candidates = list(self.policy.order(self.waiting, lambda e: self.cache.match_len(e.reusable), self.step))
        for entry in candidates:
            if self.table.free_rows == 0:
                return
            slot = self._admit(entry)
            if slot is None:
                return
            admitted.append(slot)
            writes.append(self.cache.writes(slot))
            yield slot

    def _admit(self, entry: Entry) -> int | None:
        """Give the request a row if its whole prompt fits beside what running rows will soon need, else None."""
        table, cache = self.table, self.cache
        slot = table.peek_row()
        cached = cache.acquire(slot, entry.reusable)
        need = int(cache.pages_needed(np.array([slot]), np.array([len(entry.tokens)]))[0])
        if need + self._promised(table.rows_in(State.PREFILL, State.DECODE)) > cache.available:
            cache.release(slot, entry.tokens, cached)
            return None
        table.admit(entry, cached)
        self.waiting.remove(entry)
        return slot

    def _promised(self, rows: Slots, decodes: int = 0) -> int:
        """Pages that these running rows will take: the rest of each prompt, so many decodes, and one more for each row.

        Before a step's decodes are planned there is 1: the next page is promised behind what they take.
        """
        goal = np.maximum(self.table.prefill_len[rows], self.table.computed[rows] + decodes)
        return int(self.cache.pages_needed(rows, goal).sum()) + len(rows)

    def _build(
        self, decode: Slots, chunks: list[tuple[int, int]], admitted: list[int], writes: list[PageWrites]
    ) -> StepPlan:
        """Turn the decisions into a plan and move the rows on, as if the step had been launched."""
        table = self.table
        prefill = np.array([slot for slot, _ in chunks], np.int32)
        lens = np.array([length for _, length in chunks], np.int32)
        starts = table.computed[prefill] - lens
        final = table.computed[prefill] == table.prefill_len[prefill]
        decode_lens = table.computed[decode]
        table.computed[decode] += 1
        table.state[prefill[final]] = State.DECODE
        table.in_flight[decode] += 1
        table.in_flight[prefill] += 1
        sampled = np.concatenate([decode, prefill[final]]).astype(np.int32)
        pages = [np.concatenate(part) for part in zip(*writes, strict=True)] if writes else [np.empty(0, np.int32)] * 3
        ends = starts + lens
        tokens = [table.tokens[slot, start:end] for slot, start, end in zip(prefill, starts, ends, strict=True)]
        self.step += 1
        return StepPlan(
            step=self.step,
            init=table.init_rows(admitted, init_special(table, admitted)),
            page_slots=pages[0],
            page_indices=pages[1],
            page_ids=pages[2],
            decode_slots=decode.astype(np.int32),
            decode_lens=decode_lens,
            prefill_slots=prefill,
            prefill_starts=starts,
            prefill_lens=lens,
            prefill_final=final,
            prefill_tokens=np.concatenate(tokens) if tokens else np.empty(0, np.int32),
            all_greedy=bool(table.greedy[sampled].all()),
            any_filter=bool(table.filtered[sampled].any()),
            any_min_len=bool((table.computed[sampled] < table.min_len[sampled]).any()),
            special=plan_special(table, sampled, (prefill, starts, lens), len(decode)),
        )

    # Taking in a result

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Append the step's tokens, end the requests that are done, free what no launched step touches."""
        table = self.table
        touched = np.concatenate([plan.decode_slots, plan.prefill_slots])
        table.in_flight[touched] -= 1
        scores = take_scores(table, plan, result)
        going = table.state[plan.sampled_slots] != State.ENDED
        slots, tokens = plan.sampled_slots[going], result.tokens[going]
        lengths = table.known[slots] + 1
        table.tokens[slots, lengths - 1] = tokens
        table.known[slots] = lengths
        hit = (table.stop_ids[slots] == tokens[:, None]).any(axis=1)  # never before min_tokens: masked
        full = lengths >= table.limit[slots]
        events = []
        for slot, token, stop, end in zip(slots.tolist(), tokens.tolist(), hit.tolist(), full.tolist(), strict=True):
            entry = table.entry(slot)
            if entry.constraint is not None and not stop and (error := self._follow(entry, token)):
                events.append(self._fail(slot, error))
                continue
            finish = FinishReason.STOP if stop else FinishReason.LENGTH if end else None
            event = TokenEvent(
                id=entry.request.id,
                tokens=(token,),
                finish=finish,
                cached_tokens=max(entry.cached_tokens, 0),
                logprobs=(scores[slot],) if slot in scores else (),
                prompt_logprobs=tuple(entry.prompt_scores),
            )
            if entry.prompt_scores:
                entry.prompt_scores = []
            events.append(event)
            if finish is not None:
                self._end(slot)
        leaving = (table.state[touched] == State.ENDED) | (table.state[touched] == State.RETRACTING)
        self._settle(touched[leaving].tolist())
        return events

    def _follow(self, entry: Entry, token: int) -> str | None:
        """Tell the constraint of its token; what is wrong, if anything is."""
        assert entry.constraint is not None
        try:
            return None if entry.constraint.accept(token) else f"token {token} breaks the grammar"
        except Exception as error:
            return f"the grammar failed: {error}"

    def masks(self, plan: StepPlan, vocab_size: int) -> tuple[Masks, list[TokenEvent]]:
        """The masks of the step launched last, all before it being taken in, and the ends of those that cannot go on.

        A row whose constraint allows nothing more ends there, as by a stop token that is not seen.
        """
        table, slots = self.table, plan.constrained_slots
        masks: Masks = np.full((len(slots), -(-vocab_size // 32)), -1, np.int32)
        events = []
        for slot, mask in zip(slots.tolist(), masks, strict=True):
            if table.state[slot] == State.ENDED:
                continue
            entry = table.entry(slot)
            assert entry.constraint is not None
            try:
                entry.constraint.fill(mask)
            except Exception as error:
                mask[:] = -1
                events.append(self._fail(slot, f"the grammar failed: {error}"))
                continue
            usable_words(mask[None], vocab_size)
            if table.known[slot] < table.min_len[slot]:
                forbid_tokens(mask, table.stop_ids[slot])
            if not mask.any():
                events.append(self._leave(slot, FinishReason.STOP))
        return masks, events

    def _fail(self, slot: int, error: str) -> TokenEvent:
        return self._leave(slot, FinishReason.ERROR, error)

    def _leave(self, slot: int, finish: FinishReason, error: str | None = None) -> TokenEvent:
        """End a request without a token."""
        entry = self.table.entry(slot)
        self._end(slot)
        cached = max(entry.cached_tokens, 0)
        return TokenEvent(id=entry.request.id, finish=finish, cached_tokens=cached, error=error)

    def _end(self, slot: int) -> None:
        """Mark a request as ended: it is live no more, and its row leaves when nothing launched touches it."""
        del self.live[self.table.entry(slot).request.id]
        self.table.state[slot] = State.ENDED

    def retract_last(self) -> int:
        """Send the running request that is last in rank back to the queue, now or when its step is collected.

        Returns its slot: the youngest of the worst priority. There must be a running request.
        """
        slot = int(self.table.rows_in(State.PREFILL, State.DECODE)[-1])
        self.retracted += 1
        self.table.state[slot] = State.RETRACTING
        self._settle([slot])
        return slot

    def _settle(self, slots: Iterable[int]) -> None:
        """Release the rows among these, all leaving, that no launched step touches."""
        table = self.table
        for slot in slots:
            if table.in_flight[slot]:
                continue
            entry, again = table.entry(slot), table.state[slot] == State.RETRACTING
            self.cache.release(slot, table.tokens[slot, : table.known[slot]], table.written(slot))
            table.vacate(slot)
            if again:
                self._queue(entry)
