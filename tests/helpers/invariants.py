"""What must hold of the pages after every step: each is free, cached or owned by one row, and locks are right."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from minisgl.core.pages import CacheManager, PageAllocator
from minisgl.core.plan import Int32
from minisgl.core.radix_cache import Node, RadixCache


def free_pages(allocator: PageAllocator) -> list[int]:
    free: list[int] = allocator._stack[: allocator.num_free].tolist()
    return free


def check_tree(tree: RadixCache, holders: Iterable[Node]) -> list[int]:
    """Every page in the tree; asserts that locks are those of `holders` and that the counts are right."""
    nodes = [*tree.root.children.values()]
    for node in nodes:  # grows while it is read
        nodes += node.children.values()
    locks = Counter(holders)
    for node in reversed(nodes):  # children before their parents
        assert node.locks == locks[node], "locks are not those that rows hold"
        assert node.parent is not None
        locks[node.parent] += node.locks > 0
        assert node.parent.children[node.tokens[: tree.page_size].tobytes()] is node
        assert node.end == node.parent.end + len(node.pages)
        assert len(node.tokens) == len(node.pages) * tree.page_size > 0
        assert node.queued or not node.evictable
    assert tree.num_pages == sum(len(node.pages) for node in nodes)
    assert tree.num_evictable == sum(len(node.pages) for node in nodes if node.locks == 0)
    assert len(tree.root.pages) == 0
    return [page for node in nodes for page in node.pages.tolist()]


def check_cache(cache: CacheManager) -> None:
    """Assert that each page is in exactly one place and that rows lock exactly what they borrow."""
    places = free_pages(cache._allocator) + check_tree(cache.tree, cache._nodes.values())
    for slot, count in enumerate(cache.row_pages.tolist()):
        if slot not in cache._nodes:
            assert count == 0, f"row {slot} has ended and holds pages"
            continue
        held = [node.pages for node in reversed(cache._nodes[slot].path())]
        prefix: Int32 = np.concatenate([np.empty(0, np.int32), *held])
        assert len(prefix) <= count
        row, duplicates = cache.page_table[slot, :count], cache._duplicates[slot]
        places += [*duplicates.tolist(), *row[len(prefix) :].tolist()]
        others = row[: len(prefix)] != prefix
        assert np.array_equal(row[: len(prefix)][others], duplicates), f"row {slot} borrows pages that it does not lock"
    assert sorted(places) == list(range(cache.num_pages)), "a page is in no place or in two"
