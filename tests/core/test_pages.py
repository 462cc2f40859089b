"""The free list, and rows that come, grow, publish and go: no page is in two places, each row reads its own prefix.

Faults planted once that `TestManager` notices: a release keeps its lock or frees borrowed pages too, eviction of locked
leaves, pages shifted by a split, a lock counted twice or lost by a split, a page published when written in part, kept
duplicates marked as borrowed, flags of the row before, a parent that is a leaf now and not queued.
"""

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.invariants import check_cache, free_pages
from minisgl.core.pages import CacheManager, PageAllocator
from minisgl.core.plan import Int32
from minisgl.core.radix_cache import Node


def ids(*values: int) -> Int32:
    return np.array(values, np.int32)


def test_an_allocator_hands_out_ascending_runs_and_those_freed_together_in_the_same_order() -> None:
    allocator = PageAllocator(8)
    assert [allocator.allocate(count).tolist() for count in (3, 2, 0, 3)] == [[0, 1, 2], [3, 4], [], [5, 6, 7]]
    allocator.free(ids(5, 6, 7))
    handed_out = allocator.allocate(2)
    assert handed_out.tolist() == [5, 6]
    handed_out[:] = 3
    with pytest.raises(RuntimeError, match="2 pages were asked for and 1 are free"):
        allocator.allocate(2)
    assert free_pages(allocator) == [7]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ids(0, 2), "double free of page 2"),
        (ids(1, 0, 1), "double free of page 1"),
    ],
)
def test_a_wrong_free_raises_and_changes_nothing(wrong: Int32, message: str) -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(RuntimeError, match=message):
        allocator.free(wrong)
    assert sorted(free_pages(allocator)) == [2, 3]
    allocator.free(ids(0, 1))
    assert sorted(allocator.allocate(4).tolist()) == [0, 1, 2, 3]


def grow(cache: CacheManager, slot: int, length: int) -> Int32:
    """Extend one row; return the pages that it gained."""
    return np.array(cache.extend(ids(slot), ids(length))[2], np.int32)


def acquire(cache: CacheManager, slot: int, tokens: Int32) -> list[int]:
    """The pages that a row starts with."""
    return list(map(int, cache.acquire(slot, cache.match(tokens))[2]))


def cached(cache: CacheManager, *tokens: int) -> int:
    return cache.match(ids(*tokens)).end * cache.page_size


def fill(cache: CacheManager, *prompt: int) -> None:
    """A row with this prompt comes, is computed and goes."""
    acquire(cache, 0, ids(*prompt))
    grow(cache, 0, len(prompt))
    cache.release(0, ids(*prompt), len(prompt))


def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache() -> None:
    cache = CacheManager(8, 2, True, 2, 4)
    prompt = ids(1, 2, 3, 4)
    fill(cache, *prompt)
    assert cache.num_cached == 2
    assert cached(cache, *prompt) == 2 * len(acquire(cache, 0, prompt)) == 2
    assert cached(cache, 1, 2, 3, 4, 5) == 4
    assert cached(cache) == 0


def test_published_pages_are_shared_while_their_row_runs() -> None:
    cache = CacheManager(8, 2, True, 2, 4)
    prompt = ids(1, 2, 3, 4, 5)
    acquire(cache, 0, prompt)
    mine = grow(cache, 0, 5)
    cache.publish(0, prompt, 3)
    assert (cache.num_cached, cache.num_owned, cache.available) == (1, 2, 5)
    cache.publish(0, prompt, 5)
    assert (cache.num_cached, cache.num_owned, cache.available) == (2, 1, 5)
    assert acquire(cache, 1, prompt) == mine[:2].tolist()
    cache.release(0, prompt, 5)
    assert cache.flush() == 0
    assert cache.available == 6
    cache.release(1, prompt, 4)
    assert cache.flush() == 2
    assert cache.num_free == 8


def test_extend_evicts_the_least_recently_used_prefix_and_never_a_borrowed_one() -> None:
    cache = CacheManager(6, 1, True, 2, 6)
    for first in (1, 2, 3):
        fill(cache, first, first)
    assert len(acquire(cache, 0, ids(1, 1, 9))) == 2
    assert cache.available == 4
    acquire(cache, 1, ids(7))
    grow(cache, 1, 2)
    assert [cached(cache, n, n, 0) for n in (1, 2, 3)] == [2, 0, 2]
    with pytest.raises(RuntimeError, match="3 pages are needed and 2 are available"):
        grow(cache, 1, 5)
    grow(cache, 1, 4)
    assert [cached(cache, n, n, 0) for n in (1, 2, 3)] == [2, 0, 0]
    check_cache(cache)


def test_a_match_is_no_use_of_a_prefix_and_acquire_is() -> None:
    cache = CacheManager(3, 1, True, 1, 3)
    for first in (1, 2, 3):
        fill(cache, first)
    assert cached(cache, 2, 0) == 1
    acquire(cache, 0, ids(1, 0))
    cache.release(0, ids(1, 0), 1)
    acquire(cache, 0, ids(9))
    grow(cache, 0, 1)
    assert [cached(cache, n, 0) for n in (1, 2, 3)] == [1, 0, 1]


class Row:
    """A running request as its scheduler sees it: `tokens[:known]` are seen, KV below `written` is computed."""

    def __init__(self, tokens: Int32, cached: int) -> None:
        self.tokens = tokens
        self.known = len(tokens)
        self.written = cached


class ManagerMachine(RuleBasedStateMachine):
    """A scheduler that acts at random, and a device whose page slots hold which prefix was written there.

    A prefix is an integer: prefix 0 is empty, and each (prefix, token) makes the next one.
    """

    rows: dict[int, Row]

    @initialize(page_size=st.sampled_from([1, 2, 16]), pages=st.integers(4, 32), shared=st.sampled_from([1, 1, 1, 0]))
    def start(self, page_size: int, pages: int, shared: int) -> None:
        self.shared = bool(shared)
        self.size = page_size
        self.cache = CacheManager(pages, page_size, self.shared, 4, 16)
        self.content = np.full((pages, page_size), -1, np.int64)
        self.prefixes: dict[tuple[int, int], int] = {}
        self.looked_up: list[tuple[Int32, Node]] = []  # prompts, and how far each was found
        self.rows = {}

    def prefix_ids(self, tokens: Int32) -> list[int]:
        """The prefix that ends with each token."""
        out, prefix = [], 0
        for token in tokens.tolist():
            prefix = self.prefixes.setdefault((prefix, token), len(self.prefixes) + 1)
            out.append(prefix)
        return out

    def read(self, slot: int, length: int) -> list[int]:
        positions = np.arange(length)
        pages = self.cache.page_table[slot, positions // self.size]
        found: list[int] = self.content[pages, positions % self.size].tolist()
        return found

    @precondition(lambda self: len(self.rows) < 4)
    @rule(
        blocks=st.lists(st.integers(0, 1), min_size=1, max_size=6),
        odd=st.integers(0, 15),
        parts=st.sampled_from([0, 1, 2, 4, 4]),
        share=st.booleans(),
    )
    def acquire(self, blocks: list[int], odd: int, parts: int, share: bool) -> None:
        """A row starts, prefills some quarters of what is not cached, and may publish them."""
        slot = next(slot for slot in range(4) if slot not in self.rows)
        whole = [token for block in blocks for token in [*range(self.size - 1), block]]
        tokens = np.array(whole[: len(whole) - odd % self.size], np.int32)
        node, available = self.cache.match(tokens), self.cache.available
        writes, cached = self.cache.acquire(slot, node), node.end * self.size
        assert cached < len(tokens)
        held = self.cache.page_table[slot, : node.end].tolist()
        assert writes.tolist() == [[slot] * node.end, list(range(node.end)), held]
        self.looked_up.append((tokens, node))
        assert cached == 0 or (self.shared and cached % self.size == 0)
        assert self.cache.available >= available - cached // self.size
        assert self.cache.row_pages[slot] == cached // self.size
        row = self.rows[slot] = Row(tokens, cached)
        self.compute([slot], [row.written + (row.known - row.written) * parts // 4])
        if share:
            self.offer(slot)

    @precondition(lambda self: bool(self.rows))
    @rule(which=st.integers(0, 3), parts=st.integers(1, 4), share=st.booleans())
    def prefill(self, which: int, parts: int, share: bool) -> None:
        """One row computes some quarters of the tokens it knows and has not computed."""
        slot = self.pick(which)
        row = self.rows[slot]
        self.compute([slot], [row.written + max(0, row.known - row.written) * parts // 4])
        if share:
            self.offer(slot)

    @rule(rounds=st.integers(1, 4), late=st.booleans(), token=st.integers(0, 1))
    def decode(self, rounds: int, late: bool, token: int) -> None:
        """All rows that are through their prompts go on together; the host may learn the last tokens later."""
        for last in range(rounds)[::-1]:
            room = 16 * self.size
            slots = [slot for slot, row in self.rows.items() if row.known <= row.written < room]
            for slot in slots:
                self.rows[slot].tokens = np.append(self.rows[slot].tokens, token).astype(np.int32)
            if slots and not self.compute(slots, [self.rows[slot].written + 1 for slot in slots]):
                for slot in slots:
                    self.rows[slot].tokens = self.rows[slot].tokens[:-1]
            for row in self.rows.values():
                unseen = late and last == 0 and row.known <= row.written
                row.known = max(row.known, len(row.tokens) - unseen)

    def pick(self, which: int) -> int:
        return sorted(self.rows)[which % len(self.rows)]

    def compute(self, chosen: list[int], lens: list[int]) -> bool:
        """A step: rows get pages and KV up to these lengths; False when there are not enough pages."""
        slots, new_lens = np.array(chosen), np.array(lens)
        need = self.cache.pages_needed(slots, new_lens)
        assert need.tolist() == [
            max(0, -(-n // self.size) - int(self.cache.row_pages[s])) for s, n in zip(chosen, lens, strict=True)
        ]
        table, counts, available = self.cache.page_table.copy(), self.cache.row_pages.copy(), self.cache.available
        state, fits = (self.cache.num_free, self.cache.num_cached), need.sum() <= available
        if fits:
            where, indices, pages = self.cache.extend(slots, new_lens)
            assert self.cache.available == available - need.sum()
            assert all(part.dtype == np.int32 for part in (where, indices, pages))
            table[where, indices] = pages
            counts[slots] += need
        else:
            with pytest.raises(RuntimeError, match="are needed"):
                self.cache.extend(slots, new_lens)
            assert state == (self.cache.num_free, self.cache.num_cached)
        assert np.array_equal(table, self.cache.page_table)
        assert np.array_equal(counts, self.cache.row_pages)
        if not fits:
            return False
        for slot, length in zip(chosen, lens, strict=True):
            row = self.rows[slot]
            positions = np.arange(row.written, length)
            pages = table[slot, positions // self.size]
            self.content[pages, positions % self.size] = self.prefix_ids(row.tokens[:length])[row.written :]
            row.written = length
        return True

    def offer(self, slot: int) -> None:
        row, before = self.rows[slot], self.cache.page_table.copy()
        self.cache.publish(slot, row.tokens[: row.known], row.written)
        assert np.array_equal(before, self.cache.page_table)
        self.finds(row)

    @precondition(lambda self: bool(self.rows))
    @rule(order=st.permutations(range(4)), count=st.integers(0, 4), start=st.none() | st.integers(0, 3))
    def leave(self, order: list[int], count: int, start: int | None) -> None:
        """What is foretold of rows that leave comes true, also where another row starts on what they share."""
        slots = [slot for slot in order if slot in self.rows][:count]
        new = None if start is None else self.cache.match(self.rows[self.pick(start)].tokens)
        foretold = self.cache.available_beside(new or self.cache.tree.root, slots)
        check_cache(self.cache)
        if new is not None:
            if not (free := [slot for slot in range(4) if slot not in self.rows]):
                return
            self.cache.acquire(free[0], new)
        assert self.cache.available == foretold[0]
        for slot, expected in zip(slots, foretold[1:], strict=True):
            row = self.rows.pop(slot)
            self.cache.release(slot, row.tokens[: row.known], row.written)
            assert self.cache.available == expected
        if new is not None:
            self.cache.release(free[0], ids(), 0)

    @precondition(lambda self: bool(self.rows))
    @rule(which=st.integers(0, 3))
    def release(self, which: int) -> None:
        slot = self.pick(which)
        row = self.rows.pop(slot)
        self.cache.release(slot, row.tokens[: row.known], row.written)
        assert self.cache.row_pages[slot] == 0
        self.finds(row)

    def finds(self, row: Row) -> None:
        if self.shared:
            whole = min(row.known, row.written) // self.size * self.size
            assert cached(self.cache, *row.tokens[:whole].tolist(), 99) == whole

    @rule(often=st.integers(0, 4))
    def flush(self, often: int) -> None:
        if often:
            return
        evictable = self.cache.available - self.cache.num_free
        assert self.cache.flush() == evictable
        assert self.cache.available == self.cache.num_free

    @invariant()
    def each_page_is_in_one_place(self) -> None:
        check_cache(self.cache)
        assert self.shared or self.cache.num_cached == 0
        assert self.cache.num_free + self.cache.num_cached + self.cache.num_owned == self.cache.num_pages

    @invariant()
    def an_earlier_match_is_brought_up_to_date(self) -> None:
        for tokens, node in self.looked_up[-6:]:
            assert self.cache.match(tokens, node) is self.cache.match(tokens)

    @invariant()
    def each_row_reads_its_own_prefix(self) -> None:
        for slot, row in self.rows.items():
            assert self.read(slot, row.written) == self.prefix_ids(row.tokens[: row.written])

    def teardown(self) -> None:
        for slot, row in getattr(self, "rows", {}).items():
            self.cache.release(slot, row.tokens[: row.known], row.written)
        if hasattr(self, "cache"):
            assert self.cache.num_owned == 0
            self.cache.flush()
            check_cache(self.cache)
            assert self.cache.num_free == self.cache.num_pages


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True, phases=[Phase.generate]
)
