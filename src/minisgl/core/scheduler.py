"""The scheduler: decides what the next step does, and takes in what a step did. No torch, no I/O.

A step decodes every running request and, beside them, prefills chunks of prompts under a token budget
(Sarathi-Serve, Agrawal et al. 2024), so a long prompt does not stall them. Pages are taken as they are needed. When
they run out, a request is retracted (preempted): it gives back its row and pages, keeps its place in the queue, and is
prefilled again later, mostly from the prefix cache.

A request that ends or is retracted gives its row and pages back at once, though a launched step may still write there:
steps are executed in order, so the next owner reads what its own steps have written. What that step samples is dropped.

A policy says whose prompts go on, who is retracted first, and who gives way to a waiting request. First come, first
served retracts the last by (priority, arrival), and for a waiting request only those of strictly worse priority. So no
two requests retract each other again and again, and among equals each becomes the first in the end.
"""

import time
from bisect import bisect_left, insort
from heapq import merge
from operator import attrgetter
from weakref import WeakValueDictionary

import numpy as np

from minisgl.core.pages import CacheManager, PageWrites, Slots
from minisgl.core.plan import EMPTY, Int32, Masks, StepPlan, StepResult
from minisgl.core.policy import Policy, PolicyGuard, View
from minisgl.core.request_state import MaskBudget, RequestState, RequestTable, State, TokenFilter, mask_out
from minisgl.core.types import EngineStats, FinishReason, TokenEvent

# What masks may take of a step, at least and at most. An ordinary one (a JSON schema: 50 µs) does not count.
STEP_SECONDS = (0.0005, 0.004)
ORDINARY_SECONDS = 0.0001
# CPU time that a completion may take in total: at once, and more for each token of any of its choices.
BURST_SECONDS = 0.5
TOKEN_SECONDS = 0.002

RUNNING = (State.PREFILL, State.DECODE)
by_place = attrgetter("sort_key")


class StepDraft:
    def __init__(self, budget: int) -> None:
        self.decodes: Slots = np.empty(0, np.intp)
        self.chunks: list[tuple[int, int, int]] = []  # (slot, start, tokens)
        self.admitted: list[int] = []  # rows whose parameters the device is told
        self.writes: list[PageWrites] = [np.empty((3, 0), np.int32)]
        self.budget = budget  # prompt tokens that may still go in


class Scheduler:
    """Owns the waiting queue and the request table; the cache manager owns the pages."""

    def __init__(
        self, table: RequestTable, cache: CacheManager, policy: Policy, max_prefill_length: int, vocab_size: int
    ) -> None:
        self.table = table
        self.cache = cache
        self.max_prefill_length = max_prefill_length
        self.vocab_size = vocab_size
        self.waiting: list[RequestState] = []  # in the order of their sort keys
        self.live: dict[str, RequestState] = {}
        self.events: list[TokenEvent] = []  # until the engine takes them
        self.step = 0
        self._late: list[int] = []  # slots of the step that waits for masks whose token is dropped
        self.mask_budget = STEP_SECONDS[0]
        self._owed = 0.0  # seconds that masks took, to be saved in the next steps
        self._budgets: WeakValueDictionary[str, MaskBudget] = WeakValueDictionary()
        self.admitted: list[tuple[str, int]] = []  # by the last `schedule`, with the tokens that were cached
        self.retracted_ids: list[str] = []  # since the engine emptied it, at the last launch
        self.ended: list[tuple[str, FinishReason]] = []  # the same, when it took in the last result
        self.counts = EngineStats()  # those that only grow
        self.policy = PolicyGuard(policy, View(table, cache), self.live, self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.live) - len(self.waiting)

    def add(self, request: RequestState) -> None:
        params = request.request.params
        if params.allowed_token_ids is not None or params.bad_word_ids:
            request.constraint = TokenFilter(params, self.vocab_size, request.constraint)
        if request.constraint is not None:  # the ids of a completion's choices differ behind the last hyphen
            completion = request.request.id.rpartition("-")[0] or request.request.id
            request.mask_budget = self._budgets.setdefault(completion, MaskBudget(BURST_SECONDS))
        self.live[request.request.id] = request
        self.policy.place(request)
        insort(self.waiting, request, key=by_place)

    def _leave_queue(self, request: RequestState) -> None:
        index = bisect_left(self.waiting, request.sort_key, key=by_place)
        assert self.waiting[index] is request
        del self.waiting[index]

    def abort(self, request_id: str) -> None:
        if (request := self.live.get(request_id)) is not None:
            self.counts.aborted += 1
            self._end(request, FinishReason.ABORT)

    # Planning a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step and account for it as launched; None when no row can do anything now."""
        # 1. The policy puts the prompts in order, of waiting and of running requests. If the first waiting one finds no
        #    row or too few pages, retract running ones that give way to it, and admit it.
        # 2. Every running request past its prompt decodes one token. While pages are missing, retract the last.
        # 3. In the policy's order, until the budget is used up, running requests prefill a chunk each. Waiting ones are
        #    admitted and prefill their first, up to the first whose prompt does not fit beside what running requests
        #    will soon need.
        # 4. If all this gives no work, although some is left, retract the last and try again.
        self.admitted = []
        prompts = self._prompts_in_order()
        step = StepDraft(self.max_prefill_length)
        self._make_room(step, next((request for request in prompts if request.slot < 0), None))
        while True:
            self._schedule_decodes(step)
            self._schedule_prompts(step, prompts)
            if len(step.decodes) or step.chunks:
                return self._launch(step)
            assert not step.admitted, "who is admitted prefills a chunk"
            if not len(self.table.rows_in(*RUNNING)):
                return None
            self.retract_last()

    def _prompts_in_order(self) -> list[RequestState]:
        """Whose prompts may go on: all running requests not past theirs, and as many waiting ones as may fit."""
        prefilling = sorted(self.table.requests_in(State.PREFILL), key=by_place)
        if not (prefilling or self.waiting):
            return []
        most = len(prefilling) + len(self.table.free) + 1
        prompts = self.policy.order(lambda: merge(prefilling, self.waiting, key=by_place), most)
        return prompts + sorted(set(prefilling).difference(prompts), key=by_place)

    def _make_room(self, step: StepDraft, first: RequestState | None) -> None:
        """Retract running requests that give way to the first waiting one, if it fits then and not before."""
        table, cache = self.table, self.cache
        if first is None:
            return
        running = table.requests_in(*RUNNING)
        slots = [request.slot for request in self.policy.make_room(first, running)]
        if not slots:
            return
        pages = self._pages_lacking(first) + int(self._promised(table.rows_in(*RUNNING), 1).sum())
        needed = pages - np.cumsum([0, *self._promised(np.array(slots), 1)])
        rows = len(table.free) + np.arange(len(slots) + 1)
        available = cache.available_beside(first.cached_prefix(cache), slots)
        fits = (rows > 0) & (needed <= available)  # after so many retractions, none of them first
        if count := int(fits.argmax()):  # 0 where nothing helps
            for slot in slots[:count]:
                self._retract(slot)
            self._admit(step, first)

    def _schedule_decodes(self, step: StepDraft) -> None:
        """Take the rows that decode, with pages for their next token."""
        table, cache = self.table, self.cache
        computed = table.num_computed_tokens
        while True:
            slots = table.rows_in(State.DECODE)
            need = cache.pages_needed(slots, computed[slots] + 1)
            if int(need.sum()) <= cache.available:
                break
            self.retract_last()
        # Longest first: attention then ends with short rows, and few multiprocessors wait for the last (Graham's rule).
        step.decodes = slots[np.argsort(-computed[slots], kind="stable")]
        if need.any():
            step.writes.append(cache.extend(step.decodes, computed[step.decodes] + 1))

    def _schedule_prompts(self, step: StepDraft, prompts: list[RequestState]) -> None:
        """Prefill these, admitting those that wait up to the first that does not fit, while budget and pages last."""
        fits = True
        for request in prompts:
            if request.slot < 0:
                fits = fits and self._admit(step, request)
            if request.slot >= 0 and self.table.state[request.slot] == State.PREFILL:
                self._prefill(step, request.slot)
            if not step.budget:
                return

    def _prefill(self, step: StepDraft, slot: int) -> None:
        """Prefill a chunk of this row's prompt, as large as budget and pages allow."""
        table, cache = self.table, self.cache
        computed = int(table.num_computed_tokens[slot])
        room = (int(cache.row_pages[slot]) + cache.available) * cache.page_size - computed
        length = min(int(table.prefill_len[slot]) - computed, step.budget, room)
        if length <= 0:
            return
        end = computed + length
        step.writes.append(cache.extend(np.array([slot]), np.array([end])))
        table.num_computed_tokens[slot] = end
        cache.publish(slot, table.tokens[slot, : table.num_tokens[slot]], end)
        step.chunks.append((slot, computed, length))
        step.budget -= length
        if table.request(slot).mask is not None and slot not in step.admitted:
            step.admitted.append(slot)  # again, for the device counted a token that was dropped

    def _admit(self, step: StepDraft, request: RequestState) -> bool:
        """Give the request a row if its whole prompt fits beside what running rows will soon need."""
        table, cache = self.table, self.cache
        if self._obstacle(request):
            return False
        slot, prefix = table.free[0], request.cached_prefix(cache)
        step.writes.append(cache.acquire(slot, prefix, again=request.admitted))
        cached = prefix.end * cache.page_size
        self._leave_queue(request)
        table.admit(request, cached, self.step + 1)
        if not request.admitted:
            request.admitted = True
            request.cached_tokens = cached
            self.counts.prompt_tokens += request.prompt_len
            self.counts.cached_prompt_tokens += cached
        self.admitted.append((request.request.id, cached))
        step.admitted.append(slot)
        return True

    def _pages_lacking(self, request: RequestState) -> int:
        """Pages that a waiting request takes for its prompt and a decode, beside those that are cached.

        A row that is retracted before its first decode has got no further, for the token in flight is lost.
        """
        return -(-(len(request.tokens) + 1) // self.cache.page_size) - request.cached_prefix(self.cache).end

    def _promised(self, rows: Slots, decodes: int = 0) -> Int32:
        """Pages that each of these running rows will take: for the rest of its prompt or so many decodes, and one more.

        Before a step's decodes are planned there is 1: the page after them is promised behind what they take.
        """
        goal = np.maximum(self.table.prefill_len[rows], self.table.num_computed_tokens[rows] + decodes)
        return self.cache.pages_needed(rows, goal) + np.int32(1)

    def _launch(self, step: StepDraft) -> StepPlan:
        """Make a plan of the decisions and move the rows on, as if the step had been launched."""
        table, decodes = self.table, step.decodes.astype(np.int32)
        decode_lens = table.num_computed_tokens[decodes]
        table.num_computed_tokens[decodes] = decode_lens + 1
        slots, starts, lens = np.array(step.chunks, np.int32).reshape(-1, 3).T.copy()
        final = starts + lens == table.prefill_len[slots]
        table.state[slots[final]] = State.DECODE
        sampled = np.concatenate([decodes, slots[final]])
        page_slots, page_indices, page_ids = np.concatenate(step.writes, axis=1)
        self.step += 1
        self._hold_dear(sampled)
        table.state[sampled[table.num_computed_tokens[sampled] + 1 >= table.max_tokens[sampled]]] = State.LAST
        return StepPlan(
            step=self.step,
            init=table.new_rows(step.admitted),
            page_slots=page_slots,
            page_indices=page_indices,
            page_ids=page_ids,
            decode_slots=decodes,
            decode_lens=decode_lens,
            prefill_slots=slots,
            prefill_starts=starts,
            prefill_lens=lens,
            prefill_final=final,
            prefill_tokens=np.concatenate([EMPTY, *(table.tokens[row, at : at + n] for row, at, n in step.chunks)]),
            logits=table.logits_rows(sampled, len(decodes), slots, starts, lens),
        )

    def why_waiting(self, request: RequestState) -> str:
        return self._obstacle(request) or "requests before it take the prefill budget or do not fit"

    def _obstacle(self, request: RequestState) -> str:
        """What keeps a request from being admitted now, in a sentence; nothing where it fits."""
        table = self.table
        if not table.free:
            return f"all {len(table.requests)} rows are taken"
        need, promised = self._pages_lacking(request), int(self._promised(table.rows_in(*RUNNING)).sum())
        available = self.cache.available_beside(request.cached_prefix(self.cache))[0]
        if need + promised > available:
            rest = f"running requests will need {promised}, and {available} are available"
            return f"its prompt and a decode need {need} pages beside those that are cached, {rest}"
        return ""

    # Taking in a result

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Append the step's tokens, but for those whose requests have ended or were retracted; end what is done."""
        table, sampled = self.table, plan.sampled_slots
        scores = table.take_scores(plan, result)
        going = table.unchanged_since(sampled, plan.step)
        if self._late:
            going &= ~np.isin(sampled, self._late)
            self._late = []
        slots, tokens = sampled[going], result.tokens[going]
        lengths = table.num_tokens[slots] + 1
        table.tokens[slots, lengths - 1] = tokens
        table.num_tokens[slots] = lengths
        self.counts.generated_tokens += len(slots)
        stop = (table.stop_ids[slots] == tokens[:, None]).any(axis=1)  # never before min_tokens: masked
        full = lengths >= table.max_tokens[slots]
        columns = slots.tolist(), tokens.tolist(), stop.tolist(), full.tolist()
        for slot, token, stopped, ended in zip(*columns, strict=True):
            request = table.request(slot)
            finish = FinishReason.STOP if stopped else FinishReason.LENGTH if ended else None
            event = TokenEvent(
                id=request.request.id,
                tokens=(token,),
                finish=finish,
                cached_tokens=request.cached_tokens,
                logprobs=(scores[slot],) if slot in scores else (),
                prompt_logprobs=tuple(request.prompt_scores),
            )
            self.events.append(event)
            request.prompt_scores = []
            if finish is not None:
                self._leave(request, finish)

    # Masks of rows that follow a grammar

    def masks(self, plan: StepPlan) -> Masks:
        """The masks of the step launched last, all before it being taken in.

        A row whose constraint allows nothing more ends there, as by a stop token that is not seen. Behind masks that
        took more than a step's budget the others are late: their tokens are dropped, and their rows are held.
        """
        table, slots = self.table, plan.constrained_slots
        masks: Masks = np.full((len(slots), -(-self.vocab_size // 32)), -1, np.int32)
        spent = 0.0
        for slot, mask in zip(slots.tolist(), masks, strict=True):
            if table.state[slot] == State.FREE:
                continue
            request = table.request(slot)
            if request.mask is not None:
                mask[:], request.mask = request.mask, None
            elif spent > self.mask_budget:
                self._late.append(slot)
                # Its last token goes through the model once more, as a chunk of one.
                known = int(table.num_tokens[slot])
                table.prefill_len[slot], table.num_computed_tokens[slot] = known, known - 1
            else:
                spent += self._fill(slot, mask)
        self._hold(np.array(self._late, np.intp))
        self._owed += spent
        return masks

    def fill_held(self) -> None:
        """Spend what the step's masks left of its budget on the held rows."""
        table = self.table
        rows = np.flatnonzero((table.state == State.HELD) & (table.num_tokens > table.num_computed_tokens))
        if len(rows):  # those whose masks are cheap first, then in the order in which they came
            dear = table.mask_seconds[rows] > ORDINARY_SECONDS
            rows = rows[np.lexsort((table.held_since[rows], dear))]
        for slot in rows.tolist():
            if self._owed >= self.mask_budget:
                break
            mask: Int32 = np.full(-(-self.vocab_size // 32), -1, np.int32)
            self._owed += self._fill(slot, mask)
            if table.state[slot] == State.FREE:
                continue
            table.request(slot).mask = mask
            again = table.prefill_len[slot] == table.num_tokens[slot]
            table.state[slot] = State.PREFILL if again else State.DECODE
        self._owed = max(0.0, self._owed - self.mask_budget)

    def _hold_dear(self, sampled: Int32) -> None:
        """Hold these rows behind the step that is launched, if there is no time for all their next masks in one."""
        table = self.table
        dear = sampled[table.mask_seconds[sampled] > ORDINARY_SECONDS]
        if len(dear) and ((table.state == State.HELD).any() or table.mask_seconds[dear].sum() > self.mask_budget):
            self._hold(dear)

    def _hold(self, slots: Slots | Int32) -> None:
        self.table.state[slots] = State.HELD
        self.table.held_since[slots] = self.step

    def _fill(self, slot: int, mask: Int32) -> float:
        """Overwrite the mask of a row's next token, or end the row; what of the step's budget that took."""
        begun = time.perf_counter()
        table, request = self.table, self.table.request(slot)
        constraint, total = request.constraint, request.mask_budget
        assert constraint is not None
        assert total is not None
        try:
            for token in table.tokens[slot, request.num_followed : table.num_tokens[slot]].tolist():
                if not constraint.accept(token):
                    raise ValueError(f"token {token} breaks the grammar")
            request.num_followed = int(table.num_tokens[slot])
            constraint.fill(mask)
            table.mask_seconds[slot] = constraint.seconds
            total.seconds += TOKEN_SECONDS - constraint.seconds
            if total.seconds < 0:
                raise TimeoutError(f"it took over {BURST_SECONDS} s and {TOKEN_SECONDS} s a token")
        except Exception as error:
            mask[:] = -1
            self._end(request, FinishReason.ERROR, f"the grammar failed: {error}")
        else:
            if rest := self.vocab_size % 32:
                mask[-1] &= np.int32((1 << rest) - 1)  # the other bits stand for no token
            if table.num_tokens[slot] < request.min_len:
                for token in request.stop_ids:
                    mask_out(mask, token)
            if not mask.any():
                self._end(request, FinishReason.STOP)
        taken = max(float(table.mask_seconds[slot]), time.perf_counter() - begun)  # more on a busy machine
        return max(0.0, taken - ORDINARY_SECONDS)

    def _end(self, request: RequestState, finish: FinishReason, error: str | None = None) -> None:
        """End a request by an event without a token."""
        cached = request.cached_tokens
        self.events.append(TokenEvent(id=request.request.id, finish=finish, cached_tokens=cached, error=error))
        self._leave(request, finish)

    def _leave(self, request: RequestState, finish: FinishReason) -> None:
        """The request is live no more."""
        self.ended.append((request.request.id, finish))
        del self.live[request.request.id]
        if request.slot < 0:
            self._leave_queue(request)
        else:
            self._release(request.slot)

    def retract_last(self) -> None:
        running = self.table.requests_in(*RUNNING)
        named = self.policy.retract(running) or sorted(running, key=by_place, reverse=True)
        self._retract(named[0].slot)

    def _retract(self, slot: int) -> None:
        request = self.table.request(slot)
        self.counts.retracted += 1
        self.retracted_ids.append(request.request.id)
        self._release(slot)
        insort(self.waiting, request, key=by_place)

    def _release(self, slot: int) -> None:
        table = self.table
        known = table.tokens[slot, : table.num_tokens[slot]]
        self.cache.release(slot, known, int(table.num_computed_tokens[slot]))
        table.vacate(slot)
