"""The prefix tree against a plain model: a dict from every cached prefix, in whole pages, to its last page."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.invariants import check_tree
from minisgl.core.plan import Int32
from minisgl.core.radix_cache import Node, RadixCache

Prefix = tuple[int, ...]


def ids(*values: int) -> Int32:
    return np.array(values, np.int32)


def insert(tree: RadixCache, tokens: Int32, first_page: int) -> int:
    """Insert from the root with pages `first_page`, `first_page` + 1, …; return how many were known."""
    count = len(tokens) // tree.page_size
    return tree.insert(tree.root, tokens, np.arange(first_page, first_page + count, dtype=np.int32))[1]


def use(tree: RadixCache, tokens: Int32) -> None:
    node, _ = tree.match(tokens)
    tree.lock(node)
    tree.unlock(node)


@pytest.fixture
def tree() -> RadixCache:
    return RadixCache(1)


def test_match_pages_changes_nothing(tree: RadixCache) -> None:
    insert(tree, ids(1, 2, 3), 0)
    insert(tree, ids(7, 8, 9), 3)
    assert tree.match_pages(ids(1, 2, 9)) == 2
    assert [len(node.pages) for node in tree.root.children.values()] == [3, 3]
    assert tree.evict(1).tolist() == [2]  # still the oldest


def test_insert_keeps_a_copy_of_what_it_is_given(tree: RadixCache) -> None:
    tokens, pages = ids(1, 2, 3), ids(4, 5, 6)
    tree.insert(tree.root, tokens, pages)
    tokens[:], pages[:] = 0, 0
    assert tree.match(ids(1, 2, 3))[1].tolist() == [4, 5, 6]


def test_a_locked_node_keeps_its_end_when_it_is_split(tree: RadixCache) -> None:
    insert(tree, ids(1, 2, 3, 4), 0)
    node, _ = tree.match(ids(1, 2, 3, 4))
    tree.lock(node)
    insert(tree, ids(1, 2, 8), 10)
    assert node.tokens.tolist() == [3, 4]
    assert tree.num_evictable == 1
    assert tree.evict(9).tolist() == [12]
    check_tree(tree, [node])
    tree.unlock(node)
    assert tree.num_evictable == 4


def test_the_least_recently_used_leaf_goes_first_and_from_its_end(tree: RadixCache) -> None:
    for first in (1, 2, 3):
        insert(tree, ids(first, first, first), 10 * first)
    use(tree, ids(1, 1, 1))
    assert tree.evict(2).tolist() == [21, 22]
    assert tree.evict(2).tolist() == [20, 32]
    assert tree.match_pages(ids(3, 3, 3)) == 2
    assert tree.evict(9).tolist() == [30, 31, 10, 11, 12]
    assert tree.num_pages == 0


def test_inserting_what_is_cached_is_a_use(tree: RadixCache) -> None:
    insert(tree, ids(1), 1)
    insert(tree, ids(2), 2)
    insert(tree, ids(1), 3)
    assert tree.evict(1).tolist() == [2]


def test_a_parent_is_evicted_by_its_own_age_once_it_is_a_leaf(tree: RadixCache) -> None:
    insert(tree, ids(1, 1), 10)
    insert(tree, ids(2), 20)
    use(tree, ids(1))
    assert [tree.evict(1).tolist() for _ in range(3)] == [[11], [20], [10]]


def test_a_split_is_no_use_and_both_halves_keep_their_age(tree: RadixCache) -> None:
    for first in (1, 2, 3):
        insert(tree, ids(first, first, first), 10 * first)
    tree.match(ids(2, 2))
    assert [tree.evict(count).tolist() for count in (3, 1, 1, 1, 1)] == [[10, 11, 12], [22], [21], [20], [32]]


def test_the_eviction_queue_does_not_grow_with_uses(tree: RadixCache) -> None:
    insert(tree, ids(1, 2, 3), 0)
    for _ in range(100):
        use(tree, ids(1, 2, 3))
    assert len(tree._queue) == 1


def test_check_finds_a_lock_that_no_row_holds(tree: RadixCache) -> None:
    insert(tree, ids(1), 0)
    tree.lock(tree.match(ids(1))[0])
    with pytest.raises(AssertionError, match="locks"):
        check_tree(tree, [])


class RadixMachine(RuleBasedStateMachine):
    """Inserts, matches, locks and evictions over a small alphabet, so that prefixes meet often."""

    @initialize(page_size=st.sampled_from([1, 2, 3, 16]))
    def start(self, page_size: int) -> None:
        self.tree = RadixCache(page_size)
        self.size = page_size
        self.model: dict[Prefix, int] = {}
        self.locked: list[tuple[Node, Prefix]] = []
        self.next_page = 0

    def tokens(self, blocks: list[int], odd: int) -> Prefix:
        """A prompt whose pages differ in their last token only, cut by a part of a page."""
        whole = [token for block in blocks for token in [*range(self.size - 1), block]]
        return tuple(whole[: len(whole) - odd % self.size])

    def prefixes(self, tokens: Prefix) -> list[Prefix]:
        """The prefixes of `tokens` that are whole pages, shortest first."""
        return [tokens[:end] for end in range(self.size, len(tokens) + 1, self.size)]

    def cached(self, tokens: Prefix) -> list[int]:
        """The pages that the model holds of `tokens`; a prefix is cached only behind its own prefixes."""
        return [self.model[prefix] for prefix in self.prefixes(tokens) if prefix in self.model]

    @rule(blocks=st.lists(st.integers(0, 1), max_size=6), behind=st.integers(0, 3))
    def insert(self, blocks: list[int], behind: int) -> None:
        """Behind a locked node when there is one, as a running row does, else from the root."""
        node, before = self.locked[behind] if behind < len(self.locked) else (self.tree.root, ())
        tokens = before + self.tokens(blocks, 0)
        fresh = np.arange(self.next_page, self.next_page + len(blocks), dtype=np.int32)
        self.next_page += len(blocks)
        end, known = self.tree.insert(node, np.array(tokens[len(before) :], np.int32), fresh)
        new = self.prefixes(tokens)[len(before) // self.size :]
        assert known == sum(prefix in self.model for prefix in new)
        assert (end is node) == (known == len(new))
        for prefix, page in list(zip(new, fresh.tolist(), strict=True))[known:]:
            assert prefix not in self.model
            self.model[prefix] = page
        if end is not node:
            assert end.pages.tolist() == [self.model[prefix] for prefix in new[known:]]

    @rule(blocks=st.lists(st.integers(0, 1), max_size=6), odd=st.integers(0, 15), lock=st.booleans())
    def match(self, blocks: list[int], odd: int, lock: bool) -> None:
        tokens = self.tokens(blocks, odd)
        want = self.cached(tokens)
        assert self.tree.match_pages(np.array(tokens, np.int32)) == len(want)
        node, pages = self.tree.match(np.array(tokens, np.int32))
        assert pages.tolist() == want
        if lock:
            self.tree.lock(node)
            self.locked.append((node, tokens[: len(want) * self.size]))

    @precondition(lambda self: bool(self.locked))
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.tree.unlock(node)

    @rule(count=st.integers(0, 12))
    def evict(self, count: int) -> None:
        held = {prefix for _, tokens in self.locked for prefix in self.prefixes(tokens)}
        free = {page for prefix, page in self.model.items() if prefix not in held}
        gone = set(self.tree.evict(count).tolist())
        assert len(gone) == min(count, len(free))
        assert gone <= free
        self.model = {prefix: page for prefix, page in self.model.items() if page not in gone}
        for prefix in self.model:
            assert len(self.cached(prefix)) == len(prefix) // self.size, "a prefix lost what stands before it"

    @invariant()
    def the_tree_holds_what_the_model_holds(self) -> None:
        assert sorted(check_tree(self.tree, (node for node, _ in self.locked))) == sorted(self.model.values())
        held = {prefix for _, tokens in self.locked for prefix in self.prefixes(tokens)}
        assert self.tree.num_pages == len(self.model)
        assert self.tree.num_evictable == len(self.model) - len(held)


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, phases=[Phase.generate]
)
