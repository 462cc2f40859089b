"""The prefix tree by examples. Random insertions, matches, locks and evictions are in test_pages, by its manager."""

import numpy as np
import pytest

from helpers.invariants import check_tree
from minisgl.core.plan import Int32
from minisgl.core.radix_cache import RadixCache


def ids(*values: int) -> Int32:
    return np.array(values, np.int32)


def insert(tree: RadixCache, tokens: Int32, first_page: int) -> None:
    """Insert from the root with pages `first_page`, `first_page` + 1, …."""
    count = len(tokens) // tree.page_size
    tree.insert(tree.root, tokens, np.arange(first_page, first_page + count, dtype=np.int32))


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


def test_a_locked_leaf_stays_though_it_is_the_oldest(tree: RadixCache) -> None:
    insert(tree, ids(1), 10)
    tree.lock(tree.match(ids(1))[0])
    insert(tree, ids(2), 20)
    assert tree.evict(9).tolist() == [20]


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
