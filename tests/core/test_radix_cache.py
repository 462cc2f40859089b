"""The prefix tree by examples. Random insertions, matches, locks and evictions are in test_pages, by its manager."""

import itertools

import numpy as np
import pytest

from helpers.invariants import check_tree
from minisgl.core.plan import Int32
from minisgl.core.radix_cache import EvictionPolicy, Node, RadixCache, SegmentedLRU
from minisgl.plugins import GuardedEviction


def ids(*values: int) -> Int32:
    return np.array(values, np.int32)


def insert(tree: RadixCache, tokens: Int32, first_page: int) -> None:
    """Insert with pages `first_page`, `first_page` + 1, …; what is known keeps its own."""
    pages = np.arange(first_page, first_page + len(tokens) // tree.page_size, dtype=np.int32)
    known = tree.match(tokens)
    if known.end < len(pages):
        tree.insert(known, tokens[known.end * tree.page_size :], pages[known.end :])


def use(tree: RadixCache, tokens: Int32) -> None:
    tree.use(tree.match(tokens), 0.0)


@pytest.fixture
def tree() -> RadixCache:
    return RadixCache(1)


def test_a_match_ends_with_a_node_and_makes_no_prefix_younger(tree: RadixCache) -> None:
    insert(tree, ids(1, 2, 3), 0)
    insert(tree, ids(7, 8, 9), 3)
    assert tree.match(ids(1, 2, 9)).pages.tolist() == [0, 1]
    assert [len(node.pages) for node in tree.root.children.values()] == [2, 3]
    assert tree.evict(1).tolist() == [2]  # still the oldest


def test_insert_keeps_a_copy_of_what_it_is_given(tree: RadixCache) -> None:
    tokens, pages = ids(1, 2, 3), ids(4, 5, 6)
    tree.insert(tree.root, tokens, pages)
    tokens[:], pages[:] = 0, 0
    assert tree.match(ids(1, 2, 3)).pages.tolist() == [4, 5, 6]


def test_a_locked_node_keeps_its_end_when_it_is_split(tree: RadixCache) -> None:
    insert(tree, ids(1, 2, 3, 4), 0)
    node = tree.match(ids(1, 2, 3, 4))
    tree.lock(node)
    insert(tree, ids(1, 2, 8), 10)
    assert node.tokens.tolist() == [3, 4]
    assert tree.num_evictable == 1
    assert tree.evict(9).tolist() == [12]
    check_tree(tree, [node])
    tree.unlock(node)
    assert tree.num_evictable == 4


def test_a_locked_leaf_stays_though_it_is_the_oldest(tree: RadixCache) -> None:
    insert(tree, ids(1), 10)
    tree.lock(tree.match(ids(1)))
    insert(tree, ids(2), 20)
    assert tree.evict(9).tolist() == [20]


def test_the_least_recently_used_leaf_goes_first_and_from_its_end(tree: RadixCache) -> None:
    for first in (1, 2, 3):
        insert(tree, ids(first, first, first), 10 * first)
    use(tree, ids(1, 1, 1))
    assert tree.evict(2).tolist() == [21, 22]
    assert tree.evict(2).tolist() == [20, 32]
    assert tree.match(ids(3, 3, 3)).end == 2
    assert tree.evict(9).tolist() == [30, 31, 10, 11, 12]
    assert tree.num_pages == 0


def test_only_an_admitted_request_is_a_use(tree: RadixCache) -> None:
    """Not a look-up, a lock, an unlock, nor pages that are offered and known."""
    for first in (1, 2, 3):
        insert(tree, ids(first), first)
    node = tree.match(ids(1))
    tree.lock(node)
    tree.unlock(node)
    insert(tree, ids(1), 4)
    assert tree.evict(1).tolist() == [1]
    use(tree, ids(2))
    assert [(tree.match(ids(n)).uses, tree.match(ids(n)).last_used) for n in (2, 3)] == [(2, 4), (1, 3)]
    assert tree.evict(1).tolist() == [3]


def test_slru_keeps_what_was_used_again_for_some_seconds_longer() -> None:
    tree = RadixCache(1, eviction=SegmentedLRU(protect=10))
    insert(tree, ids(1), 1)
    use(tree, ids(1))
    for second, page in ((5.0, 2), (9.0, 3), (11.0, 4)):
        tree.insert(tree.root, ids(page), ids(page), second)
    assert [tree.evict(1).tolist() for _ in range(4)] == [[2], [3], [1], [4]]


def test_a_key_that_grows_by_itself_is_looked_at_again_once() -> None:
    numbers = itertools.count()

    class Growing(EvictionPolicy):
        def key(self, node: Node) -> float:
            return next(numbers)

    tree = RadixCache(1, eviction=Growing())
    for first in (1, 2, 3):
        insert(tree, ids(first), first)
    assert sorted(tree.evict(3).tolist()) == [1, 2, 3]


@pytest.mark.parametrize("wrong", [float("nan"), "late", None, ZeroDivisionError("x")])
def test_lru_takes_the_place_of_an_eviction_policy_that_fails(wrong: object, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(EvictionPolicy):
        def key(self, node: Node) -> float:
            if node.pages[0] < 2:
                return -float(node.pages[0])
            if isinstance(wrong, Exception):
                raise wrong
            return wrong  # type: ignore[return-value]

    tree = RadixCache(1, eviction=GuardedEviction(Failing()))
    for first in (0, 1, 2, 3):
        insert(tree, ids(first), first)
    use(tree, ids(1))
    assert "the eviction policy Failing failed; lru takes its place" in caplog.text
    assert sorted(tree.evict(3).tolist()) == [0, 2, 3]


def test_a_match_is_taken_up_again_without_reading_the_prefix_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RadixCache(4)
    tokens = np.arange(4000, dtype=np.int32)
    node = tree.root
    for page in range(1000):
        node = tree.insert(node, tokens[4 * page : 4 * page + 4], ids(page))
    earlier = tree.match(tokens)
    tree.lock(tree.match(tokens[:2000]))
    tree.insert(tree.root, ids(*range(5000, 5004)), ids(5000))
    monkeypatch.setattr(tree, "root", None)
    assert tree.match(tokens, earlier).end == 1000
    monkeypatch.undo()
    tree.evict(400)
    assert tree.match(tokens, earlier).end == 600


def test_a_prefix_is_found_in_the_middle_of_a_node_once(tree: RadixCache, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(tree, ids(1, 2, 3, 4), 0)
    earlier = tree.match(ids(1, 2, 3, 9))
    assert earlier.end == 3
    monkeypatch.setattr(tree, "_descend", None)
    assert tree.match(ids(1, 2, 3, 9), earlier) is earlier
    assert tree.evict(2).tolist() == [3, 2]
    assert tree.match(ids(1, 2, 3, 9), earlier).end == 2


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
    tree.lock(tree.match(ids(1)))
    with pytest.raises(AssertionError, match="locks"):
        check_tree(tree, [])
